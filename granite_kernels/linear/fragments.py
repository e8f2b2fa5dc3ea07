"""Tiles as the tensor cores hold them, without a move between threads: k is renumbered, for weight and x alike (see body.py).

A thread's eight neighbours are four registers, and one instruction multiplies two of them. Where Triton gives a thread KWIDTH = 4
consecutive k, the first and the third register of an operand meet in one instruction, the second and the fourth in the next; the
middle bits of k are exchanged, so that these are neighbours as they were loaded, which an instruction can take where they lie.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def left_fragment(tile, GROUPS: tl.constexpr, WARPS: tl.constexpr, KWIDTH: tl.constexpr):
    """[2 GROUPS, WARPS, g, t, 8] -> [WARPS, 16 GROUPS, 32]: element e of lane t goes where mma's lane t holds its e-th value."""
    split = tl.reshape(tile, (2 * GROUPS, WARPS, 8, 4, 2, 2, 2))
    if KWIDTH == 4:
        ordered = tl.permute(split, (1, 0, 2, 5, 3, 4, 6))
    else:
        ordered = tl.permute(split, (1, 0, 2, 4, 5, 3, 6))
    return tl.reshape(ordered, (WARPS, 16 * GROUPS, 32))


@triton.jit
def right_fragment(tile, TOKENS: tl.constexpr, WARPS: tl.constexpr, KWIDTH: tl.constexpr):
    """[TOKENS / 8, WARPS, g, t, 8] -> [WARPS, 32, TOKENS], k in the same order."""
    split = tl.reshape(tile, (TOKENS // 8, WARPS, 8, 4, 2, 2, 2))
    if KWIDTH == 4:
        ordered = tl.permute(split, (1, 5, 3, 4, 6, 0, 2))
    else:
        ordered = tl.permute(split, (1, 4, 5, 3, 6, 0, 2))
    return tl.reshape(ordered, (WARPS, 32, TOKENS))
