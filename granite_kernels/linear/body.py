"""The product of a few tokens with a matrix, whose bytes are read once, straight into tensor-core registers.

    y[n, m] = sum_k weight[n, k] * x[m, k],   m < tokens <= 16

A warp's mma wants, of every row, two neighbouring k here and two there; a 128-bit load brings eight neighbours. Since a sum over
k may be taken in any order, k is renumbered, for weight and x alike, until the bytes that a thread loads are the fragment that it
must hold: no weight passes through shared memory. Tiles are [rep, WARPS, g, t, e]: lane (g, t) holds elements 8 t + e of 32 of
rows g and, by rep, g + half; warps split k as the batch of the product and meet in one sum at the end.

Rows come in pairs `half` apart, which serves every epilogue: half = 8 makes sixteen neighbouring rows, half of a head the pairs of
the rotation, half of gate|up the pairs of SwiGLU. A program owns GROUPS * 8 pairs, so that x is fetched once for 16 GROUPS rows.
SPLITS programs share a row block along k; they meet at a ticket and the last one adds the partial sums in their order.

A dense weight is up to three matrices that lie apart, as the q, k and v of somebody else's model; each row finds its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.linear.fragments import left_fragment, right_fragment
from granite_kernels.linear.packed import step_bytes, step_units
from granite_kernels.linear.prologue import add_products, inverse_rms, load_x


@triton.jit
def first_rows(block, half, GROUPS: tl.constexpr):
    """Rows of the first of each of a block's pairs, int64 [GROUPS * 8]."""
    pair = block * (GROUPS * 8) + tl.arange(0, GROUPS * 8)  # 32 bits: a 64-bit division is some hundred instructions
    return ((pair // half) * (2 * half) + pair % half).to(tl.int64)


@triton.jit
def row_of(pair, second, half, rows):
    """The first or, where `second` is 1, the second row of a pair; past the end it is the last row."""
    return tl.minimum((pair // half) * (2 * half) + pair % half + second * half, rows - 1)


@triton.jit
def sum_rows(first, half, rows, GROUPS: tl.constexpr):
    """Rows of the sums, a tuple of int64 [16], one a group: pairs begin at `first`."""
    index = tl.arange(0, 16)
    a = row_of(first + index % 8, index // 8, half, rows).to(tl.int64)
    if GROUPS == 1:
        return (a,)
    else:
        b = row_of(first + 8 + index % 8, index // 8, half, rows).to(tl.int64)
        if GROUPS == 2:
            return a, b
        else:
            c = row_of(first + 16 + index % 8, index // 8, half, rows).to(tl.int64)
            d = row_of(first + 24 + index % 8, index // 8, half, rows).to(tl.int64)
            return a, b, c, d


@triton.jit
def row_pointers(planes, ends, row, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Where rows `row` (int64, any shape) of a dense weight begin; part i of PARTS holds the rows below ends[i]."""
    pointers = planes[0] + row * COLUMNS
    if PARTS > 1:
        pointers = tl.where(row < ends[0], pointers, planes[1] + (row - ends[0]) * COLUMNS)
    if PARTS > 2:
        pointers = tl.where(row < ends[1], pointers, planes[2] + (row - ends[1]) * COLUMNS)
    return pointers


@triton.jit
def prefetch(pointers):
    """Ask for the lines at `pointers` to be brought into L2."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def step_dense(
    acc, products, x_row, norm_ptr, weight_row, inverse, first,
    COLUMNS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, UNROLL: tl.constexpr,
    KWIDTH: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """UNROLL * 32 columns; `first` int32 [1, WARPS, 1, t, 1], a lane's first eight."""
    e = tl.arange(0, 8)[None, None, None, None, :]
    for step in tl.static_range(UNROLL):
        at = first + step * 32 + e
        if EVEN:
            weight = tl.load(weight_row + at, eviction_policy="evict_first")
        else:
            weight = tl.load(weight_row + at, mask=at < COLUMNS, other=0.0, eviction_policy="evict_first")
        x, h = load_x(x_row, norm_ptr, at, at < COLUMNS, inverse, TOKENS, EVEN, NORM)
        products = add_products(products, x, WARPS, TOKENS, NORM)
        left = left_fragment(weight, GROUPS, WARPS, KWIDTH)
        acc = tl.dot(left, right_fragment(h, TOKENS, WARPS, KWIDTH), acc, input_precision="ieee")
    return acc, products


@triton.jit
def product(
    x_ptr,
    norm_ptr,
    planes,
    ends,
    tokens,
    rows,
    half,
    eps,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ONE: tl.constexpr,
    WARPS: tl.constexpr,
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    KWIDTH: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """This program's share of the product, float32 [16 GROUPS, TOKENS], rows ordered [group, first | second, 8]; and of each
    token's sum of squares, float32 [TOKENS], where NORM is 1.
    """
    DENSE: tl.constexpr = FORMAT == "dense"
    BYTES: tl.constexpr = FORMAT == "q8_0" or FORMAT == "int8" or FORMAT == "fp8"
    TWO_BITS: tl.constexpr = FORMAT == "q2_k" or FORMAT == "q3_k"
    LENGTH: tl.constexpr = COLUMNS if DENSE or BYTES else COLUMNS // 32 * (2 if TWO_BITS else 4)  # of a row of the first plane
    SPAN: tl.constexpr = UNROLL * (32 if DENSE or BYTES else 128)
    CHUNK: tl.constexpr = (COLUMNS + SPLITS * WARPS * SPAN - 1) // (SPLITS * WARPS * SPAN) * SPAN  # of one warp
    EVEN: tl.constexpr = COLUMNS == CHUNK * SPLITS * WARPS
    block, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    rep = tl.arange(0, 2 * GROUPS)[:, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None, None]
    g = tl.arange(0, 8)[None, None, :, None, None]
    lane = tl.arange(0, 4)[None, None, None, :, None]
    row = row_of(block * (GROUPS * 8) + rep // 2 * 8 + g, rep % 2, half, rows).to(tl.int64)
    weight_row = row_pointers(planes, ends, row, COLUMNS, PARTS) if DENSE else planes[0] + row * LENGTH
    first = (split * WARPS + warp) * CHUNK + lane * 8
    if PDL:
        gdc_launch_dependents()
        LINE: tl.constexpr = 128 // (weight_row.dtype.element_ty.primitive_bitwidth // 8)
        prefetch(weight_row + tl.minimum((split * WARPS + warp) * (CHUNK * LENGTH // COLUMNS) + lane * LINE, LENGTH - 1))
        gdc_wait()
    inverse = inverse_rms(x_ptr, tokens, eps, COLUMNS, TOKENS, ONE) if NORM == 2 else tl.full((TOKENS,), 1.0, tl.float32)
    token = tl.minimum(tl.arange(0, TOKENS // 8)[:, None, None, None, None] * 8 + g, tokens - 1)
    x_row = x_ptr + token.to(tl.int64) * COLUMNS
    acc = tl.zeros((WARPS, 16 * GROUPS, TOKENS), tl.float32)
    products = tl.zeros((WARPS, 16, TOKENS), tl.float32)  # of tokens with one another
    # the same places for what belongs to whole units: lanes [rep, WARPS, g, t], and the sums' rows
    rep, g = tl.arange(0, 2 * GROUPS)[:, None, None, None], tl.arange(0, 8)[None, None, :, None]
    unit_row = row_of(block * (GROUPS * 8) + rep // 2 * 8 + g, rep % 2, half, rows).to(tl.int64)
    first_unit = (split * WARPS + tl.arange(0, WARPS)[None, :, None, None]) * (CHUNK // 32) + tl.arange(0, 4)[None, None, None, :]
    sum_row = sum_rows(block * (GROUPS * 8), half, rows, GROUPS)
    begin = (split * WARPS + tl.arange(0, WARPS)[:, None]) * CHUNK
    for trip in tl.range(0, CHUNK, SPAN, num_stages=1):
        if DENSE:
            acc, products = step_dense(
                acc, products, x_row, norm_ptr, weight_row, inverse, first + trip,
                COLUMNS, GROUPS, TOKENS, WARPS, UNROLL, KWIDTH, NORM, EVEN,
            )  # fmt: skip
        elif BYTES:
            acc, products = step_bytes(
                acc, products, planes, x_row, norm_ptr, weight_row, sum_row, first + trip, begin + trip,
                COLUMNS, FORMAT, GROUPS, TOKENS, WARPS, UNROLL, KWIDTH, NORM, EVEN,
            )  # fmt: skip
        else:
            acc, products = step_units(
                acc, products, planes, x_row, norm_ptr, unit_row, sum_row, first_unit + trip // 32, begin + trip,
                COLUMNS, FORMAT, UNROLL, GROUPS, TOKENS, WARPS, KWIDTH, NORM, EVEN,
            )  # fmt: skip
    y = tl.sum(acc, 0)
    if FORMAT == "int8" or FORMAT == "fp8":
        index = tl.arange(0, 16 * GROUPS)
        row = row_of(block * (GROUPS * 8) + index // 16 * 8 + index % 8, index // 8 % 2, half, rows)
        y *= tl.load(planes[1] + row, eviction_policy="evict_first")[:, None]
    own = tl.arange(0, 16)[:, None] == tl.arange(0, TOKENS)[None, :]
    return y, tl.sum(tl.where(own, tl.sum(products, 0), 0.0), 0)


@triton.jit
def meet(y, squares, tickets_ptr, partials_ptr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, NORM: tl.constexpr):
    """Both sums over all programs of this row block, and whether this program goes on: the last one does, adding in split order."""
    if SPLITS == 1:
        return y, squares, True
    block, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    SIZE: tl.constexpr = (16 * GROUPS + 1) * TOKENS
    own = partials_ptr + block.to(tl.int64) * (SPLITS * SIZE)
    token = tl.arange(0, TOKENS)
    at = TOKENS + tl.arange(0, 16 * GROUPS)[:, None] * TOKENS + token[None, :]
    tl.store(own + split * SIZE + at, y)
    if NORM == 1:
        tl.store(own + split * SIZE + token, squares)
    tl.debug_barrier()  # every thread's stores come before the ticket
    last = tl.atomic_add(tickets_ptr + block, 1, sem="acq_rel") == SPLITS - 1
    y = tl.zeros((16 * GROUPS, TOKENS), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    if last:
        for index in tl.static_range(SPLITS):
            y += tl.load(own + index * SIZE + at, cache_modifier=".cg")
            if NORM == 1:
                squares += tl.load(own + index * SIZE + token, cache_modifier=".cg")
        tl.atomic_xchg(tickets_ptr + block, 0, sem="relaxed")  # so that the next launch, or a replayed graph, starts at zero
    return y, squares, last
