"""The product with packed weights: as the dense one of body.py, with a lane's unit of 32 columns in place of a row's next 32.

k-quants are multiplied by a float32 scale after each 256 columns, 8-bit codes after each 32 or at the end; the rest enters the
tensor cores scaled (see decode.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from granite_kernels.linear.decode import eight, load_codes, load_groups, load_scales, load_stream, super_scales
from granite_kernels.linear.fragments import left_fragment, right_fragment
from granite_kernels.linear.prologue import add_products, load_x


@triton.jit
def step_units(
    acc, products, planes, x_row, norm_ptr, row, sum_row, first_unit, begin,
    COLUMNS: tl.constexpr, FORMAT: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr,
    WARPS: tl.constexpr, KWIDTH: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """HALVES * 128 columns from `begin` int32 [WARPS, 1]; first_unit int32 [1, WARPS, 1, t], a lane's of the first 128."""
    SUPER: tl.constexpr = FORMAT == "q4_k" or FORMAT == "q5_k" or FORMAT == "q6_k" or FORMAT == "q2_k" or FORMAT == "q3_k"
    sums = tl.zeros(acc.shape, tl.float32) if SUPER else acc
    lows = tl.zeros(acc.shape, tl.float32)
    e = tl.arange(0, 8)[None, None, None, None, :]
    for half in tl.static_range(HALVES):
        unit = first_unit + half * 4
        inside = unit < COLUMNS // 32
        low, high = load_codes(planes, row, unit, inside, COLUMNS, FORMAT, EVEN)
        first, last = load_scales(planes, row, unit, inside, COLUMNS, FORMAT, EVEN)
        for j in tl.static_range(4):
            at = unit[:, :, :, :, None] * 32 + j * 8 + e
            x, h = load_x(x_row, norm_ptr, at, inside[:, :, :, :, None], 0.0, TOKENS, EVEN, NORM)
            products = add_products(products, x, WARPS, TOKENS, NORM)
            right = right_fragment(h, TOKENS, WARPS, KWIDTH)
            scale, offset, least = first if j < 2 else last
            weight = eight(low, high, scale, offset, j, FORMAT)
            sums = tl.dot(left_fragment(weight, GROUPS, WARPS, KWIDTH), right, sums)
            if FORMAT == "q4_k" or FORMAT == "q5_k" or FORMAT == "q2_k" or FORMAT == "q4_1" or FORMAT == "q5_1":
                least = left_fragment(least, GROUPS, WARPS, KWIDTH)
                if SUPER:
                    lows = tl.dot(least, right, lows)
                else:
                    sums = tl.dot(least, right, sums)
    if SUPER:
        block = begin // 256
        d, low_d = super_scales(planes, sum_row, block, block < COLUMNS // 256, COLUMNS, FORMAT, EVEN, GROUPS)
        acc = acc + d[:, :, None] * sums
        if FORMAT != "q6_k" and FORMAT != "q3_k":
            acc = acc - low_d[:, :, None] * lows  # a statement of its own: one fused instruction
    else:
        acc = sums
    return acc, products


@triton.jit
def step_bytes(
    acc, products, planes, x_row, norm_ptr, weight_row, sum_row, first, begin,
    COLUMNS: tl.constexpr, FORMAT: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
    UNROLL: tl.constexpr, KWIDTH: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """UNROLL * 32 columns from `begin` int32 [WARPS, 1]; `first` int32 [1, WARPS, 1, t, 1], a lane's eight. All codes are exact in
    bfloat16.
    """
    e = tl.arange(0, 8)[None, None, None, None, :]
    for step in tl.static_range(UNROLL):
        at = first + step * 32 + e
        inside = at < COLUMNS
        weight = load_stream(weight_row + at, inside, EVEN).to(tl.bfloat16)
        x, h = load_x(x_row, norm_ptr, at, inside, 0.0, TOKENS, EVEN, NORM)
        products = add_products(products, x, WARPS, TOKENS, NORM)
        left, right = left_fragment(weight, GROUPS, WARPS, KWIDTH), right_fragment(h, TOKENS, WARPS, KWIDTH)
        if FORMAT == "q8_0":
            unit = begin // 32 + step
            d = load_groups(planes[1], sum_row, unit, unit < COLUMNS // 32, COLUMNS // 32, EVEN, GROUPS).to(tl.float32)
            acc = acc + d[:, :, None] * tl.dot(left, right)
        else:
            acc = tl.dot(left, right, acc)
    return acc, products
