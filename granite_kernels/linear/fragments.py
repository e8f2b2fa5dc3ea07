"""Tiles as the tensor cores hold them, without a move between threads: k is renumbered, for weight and x alike (see body.py)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def left_fragment(tile, GROUPS: tl.constexpr, WARPS: tl.constexpr, KWIDTH: tl.constexpr):
    """[2 GROUPS, WARPS, g, t, 8] -> [WARPS, 16 GROUPS, 32]: element e of lane t goes where mma's lane t holds its e-th value."""
    split = tl.reshape(tile, (2 * GROUPS, WARPS, 8, 4, 8 // KWIDTH, KWIDTH))
    return tl.reshape(tl.permute(split, (1, 0, 2, 4, 3, 5)), (WARPS, 16 * GROUPS, 32))


@triton.jit
def right_fragment(tile, TOKENS: tl.constexpr, WARPS: tl.constexpr, KWIDTH: tl.constexpr):
    """[TOKENS / 8, WARPS, g, t, 8] -> [WARPS, 32, TOKENS], k in the same order."""
    split = tl.reshape(tile, (TOKENS // 8, WARPS, 8, 4, 8 // KWIDTH, KWIDTH))
    return tl.reshape(tl.permute(split, (1, 4, 3, 5, 0, 2)), (WARPS, 32, TOKENS))
