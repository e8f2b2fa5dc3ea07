"""Many tokens' chosen experts: choices sorted by expert, then one product for each tile of an expert's choices.

    inner[c] = silu(gate) * up,   gate | up = gate_up[e] @ x[c // TOP_K]        choice c = m * TOP_K + i of expert e = chosen[m, i]
    added[c] = scale * shares[c] * (down[e] @ inner[c])
    out[m] = residual[m] + sum_i added[m, i]

The sort is one launch: a program counts for its expert and then lists, in their order, the choices of it; `starts` says where each
expert's list begins. Every program of a product finds its tile from `starts`, so that the host need not know how many tiles there
are: the grid is their upper bound, choices / BLOCK_M + experts, and the programs behind the last leave. The weight of each expert is
read once for BLOCK_M of its choices, and rows of x are gathered by choice. Shares and scale are applied to the float32 sums, so that
what is rounded in between is what will be added. Sums are formed in the order of the choices: no bit depends on the other tokens.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


def _sort_cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": kernel.name, "flops": 0, "bytes": 8 * args["choices"] + 4 * grid[0]}


@triton.jit(do_not_specialize=["choices"], launch_metadata=_sort_cost)
def _sort_choices_kernel(
    chosen_ptr,  # int32 [choices]
    order_ptr,  # int32 [choices]: choices by expert, each expert's in their order
    starts_ptr,  # int32 [experts + 1]: where each expert's begin
    choices,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, choices, BLOCK):
        ids = tl.load(chosen_ptr + begin + lane, mask=begin + lane < choices, other=expert)
        lower += (ids < expert).to(tl.int32)
    start = tl.sum(lower, 0)
    tl.store(starts_ptr + expert, start)
    for begin in range(0, choices, BLOCK):
        ids = tl.load(chosen_ptr + begin + lane, mask=begin + lane < choices, other=-1)
        own = (ids == expert).to(tl.int32)
        tl.store(order_ptr + start + tl.cumsum(own, 0) - 1, begin + lane, mask=own > 0)
        start += tl.sum(own, 0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts_ptr + expert + 1, start)


def _product_cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Where every expert is chosen."""
    size, columns, choices, rows = args["x_ptr"].element_size(), args["columns"], args["choices"], args["rows"]
    read = (choices // args["TOP_K"] if args["SWIGLU"] else choices) * columns + args["experts"] * rows * columns
    written = choices * (rows // 2 if args["SWIGLU"] else rows)
    return {"name": kernel.name, "flops": 2 * choices * rows * columns, "bytes": size * (read + written) + 4 * choices}


@triton.jit
def _tile(starts_ptr, tile, experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tile's expert, and the first and last of its choices in the sorted order; expert >= experts behind the last tile."""
    index = tl.arange(0, EXPERTS)
    begins = tl.load(starts_ptr + index, mask=index < experts, other=0)
    ends = tl.load(starts_ptr + index + 1, mask=index < experts, other=0)
    tiles = tl.cdiv(ends - begins, BLOCK_M)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    own = index == expert
    begin = tl.sum(tl.where(own, begins + (tile - (last - tiles)) * BLOCK_M, 0), 0)
    return tl.where(begin < tl.sum(tl.where(own, ends, 0), 0), expert, experts), begin, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit(do_not_specialize=["choices"], launch_metadata=_product_cost)
def _grouped_kernel(
    x_ptr,  # [tokens, columns] where SWIGLU, else [choices, columns]
    weight_ptr,  # [experts * rows, columns]; an expert's rows are gate | up where SWIGLU
    order_ptr,  # int32 [choices]
    starts_ptr,  # int32 [experts + 1]
    shares_ptr,  # float32 [choices]; unread where SWIGLU
    out_ptr,  # [choices, rows / 2] where SWIGLU, else [choices, rows]
    choices,
    experts,
    rows,
    columns,
    scale,
    TOP_K: tl.constexpr,
    SWIGLU: tl.constexpr,
    EXPERTS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, begin, end = _tile(starts_ptr, tl.program_id(1), experts, EXPERTS, BLOCK_M)
    if expert >= experts:
        return
    width = rows // 2 if SWIGLU else rows
    place = begin + tl.arange(0, BLOCK_M)
    choice = tl.load(order_ptr + place, mask=place < end, other=0)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + (choice // TOP_K if SWIGLU else choice).to(tl.int64)[:, None] * columns
    weight_row = weight_ptr + (expert.to(tl.int64) * rows + tl.minimum(row, width - 1))[None, :] * columns
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, columns, BLOCK_K):
        if EVEN:
            x = tl.load(x_row + at + k[None, :])
            weight = tl.load(weight_row + at + k[:, None])
        else:
            x = tl.load(x_row + at + k[None, :], mask=(at + k < columns)[None, :], other=0.0)
            weight = tl.load(weight_row + at + k[:, None], mask=(at + k < columns)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        if SWIGLU:
            if EVEN:
                weight = tl.load(weight_row + width * columns + at + k[:, None])
            else:
                weight = tl.load(weight_row + width * columns + at + k[:, None], mask=(at + k < columns)[:, None], other=0.0)
            up = tl.dot(x, weight, up, input_precision="ieee")
    if SWIGLU:
        acc = acc * tl.sigmoid(acc) * up
    else:
        acc *= scale * tl.load(shares_ptr + choice, mask=place < end, other=0.0)[:, None]
    to = out_ptr + choice.to(tl.int64)[:, None] * width + row[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(place < end)[:, None] & (row < width)[None, :])


def _combine_cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    values = grid[0] * args["hidden"]
    return {"name": kernel.name, "flops": values * args["TOP_K"], "bytes": values * (args["TOP_K"] + 2) * args["out_ptr"].element_size()}


@triton.jit(launch_metadata=_combine_cost)
def _combine_kernel(
    added_ptr,  # [tokens, TOP_K, hidden]
    residual_ptr,  # [tokens, hidden]
    out_ptr,  # [tokens, hidden]
    hidden,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(TOP_K):
        total += tl.load(added_ptr + (token * TOP_K + place) * hidden + column, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual_ptr + token * hidden + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=inside)
