"""Embedding rows times the embedding multiplier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.weight import DENSE, Weight, dense_matrix


def embed(ids: Tensor, weight: Weight, *, multiplier: float, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [batch, tokens] of weight [vocab, hidden], times `multiplier`: [batch, tokens, hidden] in `dtype`.

    A packed weight is decoded row by row; the rows that nobody asked for stay packed.
    """
    (part,) = weight.parts
    if part.format == DENSE:
        rows = F.embedding(ids, part.planes[0]).to(dtype)
    else:
        rows = F.embedding(ids, dense_matrix(part, dtype))
    return rows if multiplier == 1.0 else rows * multiplier
