"""What happens to x on its way into the product: nothing, or the norm.

    h = x / sqrt(mean(x^2) + eps) * norm

NORM is 0 for none.

1 (bfloat16): x * norm is one product of the model's own dtype and the root is applied to the finished sums, a rounding less than
the model makes. The squares are summed on the way, since reading x beforehand would delay the first weights: the fragments of x,
already in registers, multiply one another (2 tensor-core instructions a step), and the diagonal is what is wanted. A single token's
fragment is the same in eight lanes: beside packed weights, where instructions count, each lane squares an eighth instead.

2 (float16, where x * norm could overflow, and float32): h is made as the model makes it, and a program reads x beforehand to know
its root. x is in L2 and small against the program's weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from granite_kernels.linear.fragments import left_fragment, right_fragment


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
def load_x(x_row, norm_ptr, at, inside, inverse, TOKENS: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr):
    """x of columns `at`, as it stands and as it enters the product. x_row points to rows of x; `inverse` is of its tokens (NORM 2)."""
    x = tl.load(x_row + at) if EVEN else tl.load(x_row + at, mask=inside, other=0.0)
    if NORM == 0:
        return x, x
    else:
        places = norm_ptr + (at + tl.zeros(x.shape, tl.int32))  # of x's shape, so that its values land where x's do
        norm = tl.load(places) if EVEN else tl.load(places, mask=inside, other=0.0)
        if NORM == 1:
            return x, x * norm
        else:
            return x, (x.to(tl.float32) * inverse).to(x.dtype) * norm


@triton.jit
def add_products(products, x, WARPS: tl.constexpr, TOKENS: tl.constexpr, SQUARES: tl.constexpr):
    """Add the products of tokens with one another, whose diagonal is the sums of squares: the registers of x serve both sides."""
    if SQUARES:
        both = tl.broadcast_to(tl.reshape(x, (TOKENS // 8, WARPS, 8, 4, 8)), (2, WARPS, 8, 4, 8))
        products = tl.dot(left_fragment(both, 1, WARPS, 2), right_fragment(x, TOKENS, WARPS, 2), products)
    return products


@triton.jit
def add_squares(squares, x_ptr, begin, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Add the squares of a single token's columns from `begin` int32 [WARPS, 1], each in one thread: squares float32 [WARPS, n]."""
    at = begin + tl.arange(0, squares.shape[1])[None, :]
    x = tl.load(x_ptr + at) if EVEN else tl.load(x_ptr + at, mask=at < COLUMNS, other=0.0)
    return squares + x.to(tl.float32) * x.to(tl.float32)


@triton.jit
def normed(y, squares, eps, COLUMNS: tl.constexpr, NORM: tl.constexpr):
    """The finished sums y [rows, TOKENS], times 1 / sqrt(mean of squares + eps) where that was left for the end."""
    return y * tl.rsqrt(squares / COLUMNS + eps)[None, :] if NORM == 1 else y
