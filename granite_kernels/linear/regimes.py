"""Which way a product goes, by its size and the weight's format."""

from __future__ import annotations

from torch import Tensor

from granite_kernels.launch import DECODE_TOKENS, DTYPES
from granite_kernels.weight import DENSE, Weight

PARTS = 3  # matrices that one launch reads: q, k and v of a model that keeps them apart


def is_skinny(x: Tensor, weight: Weight) -> bool:
    """Whether one launch of the body serves it: 1 to 16 tokens, and dense matrices of x's dtype with contiguous rows.

    Anything else is composed of the library's product and row-wise kernels.
    """
    few = 1 <= x.shape[:-1].numel() <= DECODE_TOKENS
    dense = x.dtype in DTYPES and len(weight.parts) <= PARTS and all(part.format == DENSE for part in weight.parts)
    return few and dense and all(part.planes[0].dtype == x.dtype and part.planes[0].is_contiguous() for part in weight.parts)
