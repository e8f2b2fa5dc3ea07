"""Which way a product goes, by its size and the weight's format.

1 to 16 tokens         one launch of the body (body.py), norm and what follows fused
more, packed           the tiled product (tiled.py), which decodes in its main loop
DECODE_ONCE and more   decoded once for the call, then the library's product; so are packed weights for float32, whose products
                       use no tensor cores
dense                  the library's product
"""

from __future__ import annotations

import torch
from torch import Tensor

from granite_kernels.launch import DECODE_TOKENS, DTYPES
from granite_kernels.weight import DENSE, Weight

PARTS = 3  # dense matrices that one launch reads: q, k and v of a model that keeps them apart
EIGHT_BITS = ("q8_0", "int8", "fp8")

DECODE_ONCE = 1024  # tokens; there decoding adds 20 % (A100) to 29 % (H100) to a product at 70 % of the card's peak, and ever less


def is_tiled(x: Tensor, weight: Weight) -> bool:
    """Whether the tiled product serves it: packed parts alone, x of 16 bits, fewer tokens than make it worth to decode once."""
    packed = all(part.format != DENSE for part in weight.parts)
    return packed and x.dtype in (torch.bfloat16, torch.float16) and 1 <= x.shape[:-1].numel() < DECODE_ONCE


def is_skinny(x: Tensor, weight: Weight) -> bool:
    """Whether one launch of the body serves it: 1 to 16 tokens, and dense matrices of x's dtype with contiguous rows, or one
    packed matrix for bfloat16.

    Anything else is composed of the library's product and row-wise kernels.
    """
    if not 1 <= x.shape[:-1].numel() <= DECODE_TOKENS or x.dtype not in DTYPES:
        return False
    if any(part.format != DENSE for part in weight.parts):
        return len(weight.parts) == 1 and x.dtype == torch.bfloat16
    planes = [part.planes[0] for part in weight.parts]
    return len(planes) <= PARTS and all(plane.dtype == x.dtype and plane.is_contiguous() for plane in planes)
