"""Which way a product goes, by its size and the weight's format.

1 to 16 tokens         one launch of the body (body.py), norm and what follows fused
more, packed           the tiled product (tiled.py), which decodes in its main loop
DECODE_ONCE and more   decoded once for the call, then the library's product: the former adds 20 % (A100) to 29 % (H100) to a
                       product at 70 % of the card's peak, and ever less; at all sizes for float32, which has no tensor cores
dense                  the library's product
"""

from __future__ import annotations

import torch
from torch import Tensor

from granite_kernels.launch import DECODE_TOKENS, DTYPES, TILED_TOKENS
from granite_kernels.linear.launches import GATE_UP, NEIGHBOURS
from granite_kernels.weight import DENSE, Weight

PARTS = 3  # that one launch reads: q, k and v
DECODE_ONCE = TILED_TOKENS[-1] + 1  # tokens


def is_tiled(x: Tensor, weight: Weight) -> bool:
    """Whether the tiled product serves it: packed parts alone, x of 16 bits, fewer tokens than make it worth to decode once."""
    packed = all(part.format != DENSE for part in weight.parts)
    return packed and x.dtype in (torch.bfloat16, torch.float16) and 1 <= x.shape[:-1].numel() < DECODE_ONCE


def is_skinny(x: Tensor, weight: Weight, half: int = NEIGHBOURS) -> bool:
    """Whether one launch of the body serves it: 1 to 16 tokens, and up to three parts in any formats, where dense ones have x's
    dtype and contiguous rows, and packed ones hold whole heads, of which a half is whole eights of rows, as gate and up are, which
    are cut nowhere else than between them.

    Anything else is composed of the library's product and row-wise kernels.
    """
    if not 1 <= x.shape[:-1].numel() <= DECODE_TOKENS or x.dtype not in DTYPES or len(weight.parts) > PARTS:
        return False
    dense = [part.planes[0] for part in weight.parts if part.format == DENSE]
    if any(plane.dtype != x.dtype or not plane.is_contiguous() for plane in dense):
        return False
    if len(dense) == len(weight.parts) or half == NEIGHBOURS:
        return True
    rows = [part.shape[0] for part in weight.parts]
    if half == GATE_UP:
        return sum(rows) % 16 == 0 and (len(rows) == 1 or (len(rows) == 2 and rows[0] == rows[1]))
    return half % 8 == 0 and all(count % (2 * half) == 0 for count in rows)
