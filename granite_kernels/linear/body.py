"""The product of a few tokens with a matrix, whose bytes are read once, straight into tensor-core registers.

    y[n, m] = sum_k weight[n, k] * x[m, k],   m < tokens <= 16

A warp's mma wants, of every row, two neighbouring k here and two there; a 128-bit load brings eight neighbours. Since a sum over
k may be taken in any order, k is renumbered, for weight and x alike, until the bytes that a thread loads are the fragment that it
must hold: no weight passes through shared memory. Tiles are [rep, WARPS, g, t, e]: lane (g, t) holds elements 8 t + e of 32 of
rows g and, by rep, g + half; warps split k as the batch of the product and meet in one sum at the end.

Rows come in pairs `half` apart, which serves every epilogue: half = 8 makes sixteen neighbouring rows, half of a head the pairs of
the rotation, None (half of all rows) the pairs of SwiGLU; a constant, so that nothing is divided by it. A program owns `groups` * 8
pairs, so that x is fetched once for 16 * groups rows. `splits` programs share a row block along k; they meet at a ticket and the
last one adds the partial sums in their order.

A weight is made of pieces along its rows, each of its own format; a program's rows are all of one piece, except where gate and up
are pieces of their own. A dense weight is up to three matrices that lie apart, as the q, k and v of somebody else's model; each
row finds its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.linear.fragments import left_fragment, right_fragment
from granite_kernels.linear.packed import step_plain, step_units
from granite_kernels.linear.prologue import add_products, add_squares, inverse_rms, load_x


@triton.jit
def row_of(pair, second, half, rows):
    """The first or, where `second` is 1, the second row of a pair; past the end it is the last row. half None: of all rows."""
    if half is None:
        return tl.minimum(pair, rows // 2 - 1) + second * (rows // 2)
    else:
        return tl.minimum((pair // half) * (2 * half) + pair % half + second * half, rows - 1)


@triton.jit
def eight_rows(group, second, half, rows):
    """First of the eight neighbours that are the first or, where `second` is 1, the second rows of a packed weight's group of pairs.

    `half` is a multiple of 8, or None for half of all rows; past the end they are the last eight, which planes have wherever `rows`
    ends.
    """
    if half is None:
        return (tl.minimum(group * 8, rows // 2 - 8) + second * (rows // 2)).to(tl.int64)
    else:
        pair = tl.minimum(group * 8, tl.cdiv(rows, 2 * half) * half - 8)
        return ((pair // half) * (2 * half) + pair % half + second * half).to(tl.int64)


@triton.jit
def sum_rows(group, half, rows, base, GROUPS: tl.constexpr):
    """Of the rows of the sums: the first of each one's eight, a tuple of int64 [16], one a group."""
    second = tl.arange(0, 16) // 8
    a = eight_rows(group, second, half, rows) + base
    if GROUPS == 1:
        return (a,)
    else:
        b = eight_rows(group + 1, second, half, rows) + base
        if GROUPS == 2:
            return a, b
        else:
            return a, b, eight_rows(group + 2, second, half, rows) + base, eight_rows(group + 3, second, half, rows) + base


@triton.jit
def sum_warps(values):
    """Sum [WARPS, rows, columns] over the warps, neighbours first. A value is moved once; tl.sum of a dimension that warps share moves
    it, and what becomes of it, five times.
    """
    WARPS: tl.constexpr = values.shape[0]
    ROWS: tl.constexpr = values.shape[1]
    COLUMNS: tl.constexpr = values.shape[2]
    y = tl.permute(values, (1, 2, 0))
    for halving in tl.static_range(8):
        if WARPS >> (halving + 1):
            a, b = tl.split(tl.reshape(y, (ROWS, COLUMNS, WARPS >> (halving + 1), 2)))
            y = a + b
    return tl.reshape(y, (ROWS, COLUMNS))


@triton.jit
def row_pointers(planes, ends, row, COLUMNS: tl.constexpr):
    """Where rows `row` (int64, any shape) of a dense weight begin; part i holds the rows below ends[i]."""
    pointers = planes[0] + row * COLUMNS
    if len(planes) > 1:
        pointers = tl.where(row < ends[0], pointers, planes[1] + (row - ends[0]) * COLUMNS)
    if len(planes) > 2:
        pointers = tl.where(row < ends[1], pointers, planes[2] + (row - ends[1]) * COLUMNS)
    return pointers


@triton.jit
def prefetch(pointers):
    """Ask for the lines at `pointers` to be brought into L2."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def lanes(COUNT: tl.constexpr, WARPS: tl.constexpr):
    """Coordinates of the lanes of COUNT tiles, (rep, warp, g, t) int32 [COUNT * WARPS * 32, 1] each.

    A tile of eight neighbours in two dimensions, whose order no version of Triton changes: 3.6 would exchange rep and t of five.
    """
    lane = tl.arange(0, COUNT * WARPS * 32)[:, None]
    return lane // (WARPS * 32), lane // 32 % WARPS, lane // 4 % 8, lane % 4


@triton.jit
def of_tokens(values, WARPS: tl.constexpr):
    """values [TOKENS], each where the lanes of x hold its token: [TOKENS * WARPS * 4, 1]."""
    TOKENS: tl.constexpr = values.shape[0]
    spread = tl.broadcast_to(tl.reshape(values, (TOKENS // 8, 1, 8, 1)), (TOKENS // 8, WARPS, 8, 4))
    return tl.reshape(spread, (TOKENS * WARPS * 4, 1))


@triton.jit
def step_dense(
    acc, products, x_row, x_first, norm_ptr, weight_row, weight_first, inverse, trip,
    COLUMNS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, UNROLL: tl.constexpr,
    KWIDTH: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """UNROLL * 32 columns, `trip` behind the first eight of each lane of x and of the weight, int32 [lanes, 1]."""
    e = tl.arange(0, 8)[None, :]
    for step in tl.static_range(UNROLL):
        at = weight_first + trip + step * 32 + e
        if EVEN:
            weight = tl.load(weight_row + at, eviction_policy="evict_first")
        else:
            weight = tl.load(weight_row + at, mask=at < COLUMNS, other=0.0, eviction_policy="evict_first")
        at = x_first + trip + step * 32 + e
        x, h = load_x(x_row, norm_ptr, at, at < COLUMNS, inverse, TOKENS, EVEN, NORM)
        products = add_products(products, x, WARPS, TOKENS, NORM == 1)
        left = left_fragment(weight, GROUPS, WARPS, KWIDTH)
        acc = tl.dot(left, right_fragment(h, TOKENS, WARPS, KWIDTH), acc, input_precision="ieee")
    return acc, products


@triton.jit
def piece_product(
    x_ptr, norm_ptr, planes, ends, order, block, split, tokens, rows, base, half, eps,
    PIECE: tl.constexpr, GROUPS: tl.constexpr, NORM: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """As `product`, of one piece: `block` counts its blocks, `rows` its rows."""
    COLUMNS: tl.constexpr = SHAPE.columns
    TOKENS: tl.constexpr = SHAPE.tokens
    WARPS: tl.constexpr = SHAPE.warps
    SPLITS: tl.constexpr = SHAPE.splits
    FORMAT: tl.constexpr = SHAPE.pieces[PIECE].format
    UNROLL: tl.constexpr = SHAPE.pieces[PIECE].unroll
    KWIDTH: tl.constexpr = SHAPE.pieces[PIECE].kwidth
    DENSE: tl.constexpr = FORMAT == "dense"
    BYTES: tl.constexpr = FORMAT == "q8_0" or FORMAT == "int8" or FORMAT == "fp8"
    TWO_BITS: tl.constexpr = FORMAT == "q2_k" or FORMAT == "q3_k"
    PLAIN: tl.constexpr = not DENSE and x_ptr.dtype.element_ty != tl.bfloat16
    LENGTH: tl.constexpr = COLUMNS if DENSE else COLUMNS // 32 * (8 if BYTES else (2 if TWO_BITS else 4))  # of a row of the first plane
    WIDTH: tl.constexpr = 8 if DENSE else (16 if BYTES else 32)  # columns that a lane takes at a time
    SPAN: tl.constexpr = 32 if PLAIN else UNROLL * 4 * WIDTH
    CHUNK: tl.constexpr = (COLUMNS + SPLITS * WARPS * SPAN - 1) // (SPLITS * WARPS * SPAN) * SPAN  # of one warp
    EVEN: tl.constexpr = COLUMNS == CHUNK * SPLITS * WARPS
    planes = planes[SHAPE.pieces[PIECE].plane : SHAPE.pieces[PIECE].plane + SHAPE.pieces[PIECE].planes]
    if DENSE:
        rep, warp, g, lane = lanes(2 * GROUPS, WARPS)
    else:
        rep = tl.arange(0, 2 * GROUPS)[:, None, None, None, None]
        warp = tl.arange(0, WARPS)[None, :, None, None, None]
        g = tl.arange(0, 8)[None, None, :, None, None]
        lane = tl.arange(0, 4)[None, None, None, :, None]
    LINE: tl.constexpr = 1024 // planes[0].dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    begins = tl.minimum((split * WARPS + warp) * (CHUNK * LENGTH // COLUMNS) + lane * LINE, LENGTH - 1)
    if DENSE:
        row = row_of(block * (GROUPS * 8) + rep // 2 * 8 + g, rep % 2, half, rows).to(tl.int64) + base
        weight_row = row_pointers(planes, ends, row, COLUMNS)
        weight_first = (split * WARPS + warp) * CHUNK + lane * 8
        begins = weight_row + begins
    else:  # whole eights are far apart alike: constants of an instruction where they can be
        begins = planes[0] + ((eight_rows(block * GROUPS + rep // 2, rep % 2, half, rows) + base) * LENGTH + (g * LENGTH + begins))
    if SHAPE.pdl:
        gdc_launch_dependents()
        prefetch(begins)
        gdc_wait()
    inverse = inverse_rms(x_ptr, tokens, eps, COLUMNS, TOKENS, SHAPE.one) if NORM == 2 else tl.full((TOKENS,), 1.0, tl.float32)
    if DENSE:
        block_of_x, warp, g, lane = lanes(TOKENS // 8, WARPS)
        token = tl.minimum(block_of_x * 8 + g, tokens - 1) if order is None else of_tokens(order, WARPS)
        x_first = (split * WARPS + warp) * CHUNK + lane * 8
        inverse = of_tokens(inverse, WARPS) if NORM == 2 else 1.0
    else:
        token = tl.minimum(tl.arange(0, TOKENS // 8)[:, None, None, None, None] * 8 + g, tokens - 1)
        token = token if order is None else tl.reshape(order, (TOKENS // 8, 1, 8, 1, 1))
    x_row = x_ptr + token.to(tl.int64) * COLUMNS
    token = tl.minimum(tl.arange(0, TOKENS)[None, :, None], tokens - 1)
    x_rows = x_ptr + (token if order is None else order[None, :, None]).to(tl.int64) * COLUMNS
    acc = tl.zeros((WARPS, 16 * GROUPS, TOKENS), tl.float32)
    ALONE: tl.constexpr = SHAPE.one and NORM == 1 and not DENSE  # its squares need no tensor cores
    products = tl.zeros((WARPS, SPAN) if ALONE else (WARPS, 16, TOKENS), tl.float32)  # of tokens with one another
    # the same places for what belongs to whole units: lanes [rep, WARPS, g, t], and the sums' rows
    rep, g = tl.arange(0, 2 * GROUPS)[:, None, None, None], tl.arange(0, 8)[None, None, :, None]
    eight = eight_rows(block * GROUPS + rep // 2, rep % 2, half, rows) + base
    first_unit = (split * WARPS + tl.arange(0, WARPS)[None, :, None, None]) * (CHUNK // WIDTH) + tl.arange(0, 4)[None, None, None, :]
    index = tl.arange(0, 16 * GROUPS)
    y_row = eight_rows(block * GROUPS + index // 16, index // 8 % 2, half, rows) + base + index % 8
    plain_row = y_row[:, None]
    sum_eight = sum_rows(block * GROUPS, half, rows, base, GROUPS)
    begin = (split * WARPS + tl.arange(0, WARPS)[:, None]) * CHUNK
    for trip in tl.range(0, CHUNK, SPAN, num_stages=1):
        if DENSE:
            acc, products = step_dense(
                acc, products, x_row, x_first, norm_ptr, weight_row, weight_first, inverse, trip,
                COLUMNS, GROUPS, TOKENS, WARPS, UNROLL, KWIDTH, NORM, EVEN,
            )  # fmt: skip
        elif PLAIN:
            acc = step_plain(
                acc, planes, x_rows, norm_ptr, plain_row, inverse, begin + trip, COLUMNS, SHAPE.pieces[PIECE], TOKENS, NORM, EVEN
            )  # fmt: skip
        else:
            if ALONE:
                products = add_squares(products, x_ptr, begin + trip, COLUMNS, EVEN)
            acc, products = step_units(
                acc, products, planes, x_row, norm_ptr, eight, g, sum_eight, first_unit, begin // 256, trip,
                COLUMNS, FORMAT, UNROLL, WIDTH, GROUPS, TOKENS, WARPS, KWIDTH, NORM, NORM == 1 and not ALONE, EVEN,
            )  # fmt: skip
    y = sum_warps(acc)
    if not PLAIN and not DENSE:
        y *= 8388608.0  # 2^23: see decode.py
    if not PLAIN and (FORMAT == "int8" or FORMAT == "fp8"):
        y *= tl.load(planes[1] + y_row, eviction_policy="evict_first")[:, None]
    if ALONE:
        return y, tl.broadcast_to(tl.sum(products), (TOKENS,))
    else:
        own = tl.arange(0, 16)[:, None] == tl.arange(0, TOKENS)[None, :]
        return y, tl.sum(tl.where(own, sum_warps(products), 0.0), 0)


@triton.jit
def place(block, ends, half, SHAPE: tl.constexpr):
    """Which piece a block belongs to, its number among that piece's blocks, the piece's first row and the row behind it."""
    PIECES: tl.constexpr = len(SHAPE.pieces)
    piece, start, end = 0, 0, ends[0 if PIECES > 1 else len(ends) - 1]
    for index in tl.static_range(1, PIECES):
        blocks = tl.cdiv(tl.cdiv(end - start, 2 * half) * half, SHAPE.groups * 8)
        beyond = (piece == index - 1) & (block >= blocks)
        piece = tl.where(beyond, index, piece)
        block = tl.where(beyond, block - blocks, block)
        start, end = tl.where(beyond, ends[index - 1], start), tl.where(beyond, ends[index], end)
    return piece, block, start, end


@triton.jit
def first_rows(block, half, GROUPS: tl.constexpr):
    """Rows of the first of each of a block's pairs, int32 [GROUPS * 8]."""
    pair = block * (GROUPS * 8) + tl.arange(0, GROUPS * 8)
    return (pair // half) * (2 * half) + pair % half


@triton.jit
def product(
    x_ptr, norm_ptr, planes, ends, order, block, split, tokens, base, half, eps, NORM: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """This program's share of the product, float32 [16 groups, TOKENS], rows ordered [group, first | second, 8]; and of each
    token's sum of squares, float32 [TOKENS], where NORM is 1.

    x_ptr [*, columns]: token m is row m or, unless it is None, row order[m], order int32 [TOKENS]; planes of all pieces; ends, the row
    behind each part; `base` is added to every row: the first of the expert that is meant.
    """
    GROUPS: tl.constexpr = SHAPE.groups
    TOKENS: tl.constexpr = SHAPE.tokens
    PIECES: tl.constexpr = len(SHAPE.pieces)
    if SHAPE.across:  # neighbours of either piece
        inner = ends[0]
        a, squares = piece_product(
            x_ptr, norm_ptr, planes, ends, order, block, split, tokens, inner, base, 8, eps, 0, GROUPS // 2, NORM, SHAPE
        )  # fmt: skip
        b, _ = piece_product(
            x_ptr, norm_ptr, planes, ends, order, block, split, tokens, inner, base, 8, eps, 1, GROUPS // 2, NORM, SHAPE
        )  # fmt: skip
        y = tl.permute(tl.reshape(tl.join(a, b), (GROUPS, 8, TOKENS, 2)), (0, 3, 1, 2))
        return tl.reshape(y, (16 * GROUPS, TOKENS)), squares
    elif PIECES == 1:
        return piece_product(
            x_ptr, norm_ptr, planes, ends, order, block, split, tokens, ends[len(ends) - 1], base, half, eps, 0, GROUPS, NORM, SHAPE
        )  # fmt: skip
    else:
        piece, block, start, end = place(block, ends, half, SHAPE)
        y, squares = tl.zeros((16 * GROUPS, TOKENS), tl.float32), tl.zeros((TOKENS,), tl.float32)
        for index in tl.static_range(PIECES):
            if piece == index:
                y, squares = piece_product(
                    x_ptr, norm_ptr, planes, ends, order, block, split, tokens, end - start, base, half, eps, index, GROUPS, NORM, SHAPE
                )  # fmt: skip
        return y, squares


@triton.jit
def meet(y, squares, block, split, tickets_ptr, partials_ptr, NORM: tl.constexpr, SHAPE: tl.constexpr):
    """Both sums over all programs of this row block, and whether this program goes on: the last one does, adding in split order."""
    TOKENS: tl.constexpr = SHAPE.tokens
    ROWS: tl.constexpr = 16 * SHAPE.groups
    SPLITS: tl.constexpr = SHAPE.splits
    if SPLITS == 1:
        return y, squares, True
    SIZE: tl.constexpr = (ROWS + 1) * TOKENS
    own = partials_ptr + block.to(tl.int64) * (SPLITS * SIZE)
    token = tl.arange(0, TOKENS)
    at = TOKENS + tl.arange(0, ROWS)[:, None] * TOKENS + token[None, :]
    tl.store(own + split * SIZE + at, y)
    if NORM == 1:
        tl.store(own + split * SIZE + token, squares)
    tl.debug_barrier()  # every thread's stores come before the ticket
    last = tl.atomic_add(tickets_ptr + block, 1, sem="acq_rel") == SPLITS - 1
    y = tl.zeros((ROWS, TOKENS), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    if last:
        for index in tl.static_range(SPLITS):
            y += tl.load(own + index * SIZE + at, cache_modifier=".cg")
            if NORM == 1:
                squares += tl.load(own + index * SIZE + token, cache_modifier=".cg")
        tl.atomic_xchg(tickets_ptr + block, 0, sem="relaxed")  # so that the next launch, or a replayed graph, starts at zero
    return y, squares, last
