"""Which way a product goes, by its size."""

from __future__ import annotations

from torch import Tensor

from granite_kernels.launch import DECODE_TOKENS
from granite_kernels.weight import DENSE, Weight


def is_skinny(x: Tensor, weight: Weight) -> bool:
    """Whether one launch of the body serves it: 1 to 16 tokens and one dense matrix in the dtype of x, rows contiguous."""
    return x.shape[:-1].numel() <= DECODE_TOKENS and weight.formats == (DENSE,) and weight.parts[0].planes[0].dtype == x.dtype
