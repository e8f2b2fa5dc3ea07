"""Embedding rows times the embedding multiplier."""

from __future__ import annotations

import torch
from torch import Tensor

from granite_kernels import formats
from granite_kernels.weight import DENSE, Weight


def embed(ids: Tensor, weight: Weight, *, multiplier: float, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [batch, tokens] of weight [vocab, hidden], times `multiplier`: [batch, tokens, hidden] in `dtype`.

    A packed weight is decoded row by row; the rows that nobody asked for stay packed.
    """
    (part,) = weight.parts
    if part.format == DENSE:
        rows = part.planes[0][ids].to(dtype)
    else:
        rows = formats.get(part.format).rows(part.planes, part.shape, ids, dtype)
    return rows if multiplier == 1.0 else rows * multiplier
