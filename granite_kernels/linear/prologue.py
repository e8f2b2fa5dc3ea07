"""What happens to x on its way into the product: nothing, or the norm.

    h = x / sqrt(mean(x^2) + eps) * norm

A program reads x once to know the mean of squares, which costs little: x is in L2 and small against the program's weights.
NORM is 0 for none; 1 where x * norm is one product of the model's own dtype and the root is applied to the finished sums, a
rounding less than the model makes; 2 where h is made as the model makes it, because x * norm could overflow (float16) or the
sums should see what the model's do (float32).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_rms(x_ptr, tokens, eps, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, ONE: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of every token, float32 [TOKENS]; rows past `tokens` repeat the last."""
    SIZE: tl.constexpr = 1 if ONE else TOKENS
    WIDE: tl.constexpr = triton.next_power_of_2(COLUMNS) if COLUMNS * SIZE <= 16384 else 16384 // SIZE
    token = tl.minimum(tl.arange(0, SIZE), tokens - 1).to(tl.int64)[:, None] * COLUMNS
    squares = tl.zeros((SIZE,), tl.float32)
    for begin in tl.static_range(0, COLUMNS, WIDE):
        k = begin + tl.arange(0, WIDE)[None, :]
        if begin + WIDE <= COLUMNS:
            x = tl.load(x_ptr + token + k).to(tl.float32)
        else:
            x = tl.load(x_ptr + token + k, mask=k < COLUMNS, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    inverse = tl.rsqrt(squares / COLUMNS + eps)
    return tl.broadcast_to(inverse, (TOKENS,)) if ONE else inverse


@triton.jit
def apply_norm(x, norm_ptrs, inside, inverse, TOKENS: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr):
    """x [TOKENS / 8, WARPS, 8, 4, 8] as it enters the product. norm_ptrs has x's shape, so that its values land where x's do."""
    if NORM == 0:
        return x
    norm = tl.load(norm_ptrs) if EVEN else tl.load(norm_ptrs, mask=inside, other=0.0)
    if NORM == 1:
        return x * norm
    factor = tl.reshape(inverse, (TOKENS // 8, 1, 8, 1, 1))
    return (x.to(tl.float32) * factor).to(x.dtype) * norm
