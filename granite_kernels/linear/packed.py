"""The product with packed weights: as the dense one of body.py, with a lane's unit of 16 or 32 columns in place of a row's next 32.

The k that a product of 32 takes together are eight neighbours of four units, which asks only that x be read alike. k-quants are
multiplied by a float32 scale after each 256 columns; all else enters the tensor cores scaled (see decode.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from granite_kernels.linear.decode import eight, load_codes
from granite_kernels.linear.fragments import left_fragment, right_fragment
from granite_kernels.linear.prologue import add_products, load_x
from granite_kernels.linear.scales import load_scales, super_scales
from granite_kernels.linear.tiles import tile_values


@triton.jit
def step_units(
    acc, products, planes, x_row, norm_ptr, first, g, sum_first, unit, block, trip,
    COLUMNS: tl.constexpr, FORMAT: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    TOKENS: tl.constexpr, WARPS: tl.constexpr, KWIDTH: tl.constexpr, NORM: tl.constexpr, SQUARES: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """STEPS * 4 units of WIDTH columns, `trip` columns behind a lane's first `unit` int32 [1, WARPS, 1, t] and the 256 columns
    `block` int32 [WARPS, 1] that begin there.
    """
    SUPER: tl.constexpr = FORMAT == "q4_k" or FORMAT == "q5_k" or FORMAT == "q6_k" or FORMAT == "q2_k" or FORMAT == "q3_k"
    LOWS: tl.constexpr = FORMAT == "q4_k" or FORMAT == "q5_k" or FORMAT == "q2_k"
    sums = tl.zeros(acc.shape, tl.float32) if SUPER else acc
    lows = tl.zeros(acc.shape, tl.float32)
    on = trip // WIDTH
    column = unit[:, :, :, :, None] * WIDTH + tl.arange(0, 8)
    x_at, norm_at = x_row + column + trip, norm_ptr + (column + tl.zeros(x_row.shape, tl.int32)) + trip
    for step in tl.static_range(STEPS):
        inside = unit + on + step * 4 < COLUMNS // WIDTH
        low, high = load_codes(planes, first, g, unit, on, inside, step * 4, COLUMNS, FORMAT, EVEN)
        scales, others = load_scales(planes, first, g, unit, on, inside, step * 4, COLUMNS, FORMAT, EVEN)
        for j in tl.static_range(WIDTH // 8):
            x, h = load_x(x_at, norm_at, step * 4 * WIDTH + j * 8, inside[:, :, :, :, None], 0.0, TOKENS, EVEN, NORM)
            products = add_products(products, x, WARPS, TOKENS, SQUARES)
            right = right_fragment(h, TOKENS, WARPS, KWIDTH)
            scale, offset, least = scales if j < WIDTH // 16 else others
            weight = eight(low, high, scale, offset, j, FORMAT)
            sums = tl.dot(left_fragment(weight, GROUPS, WARPS, KWIDTH), right, sums)
            if LOWS:
                lows = tl.dot(left_fragment(least, GROUPS, WARPS, KWIDTH), right, lows)
    if SUPER:
        inside = block + trip // 256 < COLUMNS // 256
        d, low_d = super_scales(planes, sum_first, block, trip // 256, inside, COLUMNS, FORMAT, EVEN, GROUPS)
        acc = acc + d[:, :, None] * sums
        if LOWS:
            acc = acc - low_d[:, :, None] * lows  # a statement of its own: one fused instruction
    else:
        acc = sums
    return acc, products


@triton.jit
def step_plain(
    acc, planes, x_row, norm_ptr, row, inverse, begin,
    COLUMNS: tl.constexpr, PIECE: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """32 columns from `begin` int32 [WARPS, 1] for float16 and float32: weights as float32 defines them, rounded once to x's dtype.

    row int64 [rows, 1]; x_row points to rows of x, [1, TOKENS, 1].
    """
    WARPS: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[1]
    unit = tl.trans(begin) // 32
    inside = None if EVEN else (unit < COLUMNS // 32) & (row >= 0)
    values = tile_values(planes, row, unit, inside, COLUMNS, PIECE.format, PIECE.low, PIECE.high, PIECE.group, PIECE.center)
    at = begin[:, :, None] + tl.arange(0, 32)[None, None, :]
    real = at < COLUMNS
    x = tl.load(x_row + at) if EVEN else tl.load(x_row + at, mask=real, other=0.0)
    if NORM == 2:
        norm = tl.load(norm_ptr + at) if EVEN else tl.load(norm_ptr + at, mask=real, other=0.0)
        x = (x.to(tl.float32) * tl.reshape(inverse, (1, TOKENS, 1))).to(x.dtype) * norm
    weight = tl.permute(tl.reshape(values, (ROWS, WARPS, 32)), (1, 0, 2)).to(x.dtype)
    if not EVEN:
        weight = tl.where(real, weight, 0.0)  # unspecified there
    return tl.dot(weight, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
