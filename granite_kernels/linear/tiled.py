"""The product of 17 and more tokens with a packed matrix: decoded in the main loop, multiplied by tensor cores.

    out[m, n] = sum_k x[m, k] * weight[n, k]        or residual[m, n] + scale * that

x [tokens, columns] of 16 bits; out [tokens, rows], rows of the result of a larger weight. Weights are rounded to the dtype of x once,
as a model holds them that was decoded beforehand. A program owns a tile of the result; neighbours share the tile's weights, which
so come from memory once. Where tiles are few, SPLITS programs share the columns; they meet at a ticket and the last one adds the
partial sums in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.launch import target, tiled_launch
from granite_kernels.linear.tiles import as_words, constants, tile_values
from granite_kernels.operation import operation
from granite_kernels.weight import Weight
from granite_kernels.workspace import Workspace


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    size, tokens, rows, columns, planes = args["x_ptr"].element_size(), args["tokens"], args["rows"], args["COLUMNS"], args["planes"]
    weight = rows * sum(plane.numel() * plane.element_size() for plane in planes) / planes[0].shape[0]
    activations = size * tokens * (columns + (2 if args["ADD"] else 1) * rows)
    return {"name": kernel.name, "flops": 2 * tokens * rows * columns, "bytes": int(weight) + activations}


@triton.jit
def _settled(values):
    """The same values, of 16 bits, behind an instruction that ends the compiler's search for where they come from.

    Finding 8 or 16 stored bits it would give the tensor cores' operands an order of k that suits such loads, and read both from
    shared memory by many narrow loads in place of ldmatrix.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=False, pack=2)


@triton.jit
def _meet(acc, tile, split, tickets_ptr, partials_ptr, SPLITS: tl.constexpr):
    """The sum over all programs of this tile, and whether this program goes on: the last one does, adding in split order."""
    if SPLITS == 1:
        return acc, True
    else:
        M: tl.constexpr = acc.shape[0]
        N: tl.constexpr = acc.shape[1]
        place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
        own = partials_ptr + tile.to(tl.int64) * (SPLITS * M * N)
        tl.store(own + split * (M * N) + place, acc)
        tl.debug_barrier()  # every thread's stores come before the ticket
        last = tl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        acc = tl.zeros((M, N), tl.float32)
        if last:
            for index in tl.range(0, SPLITS, num_stages=1):
                acc += tl.load(own + index * (M * N) + place, cache_modifier=".cg")
            tl.atomic_xchg(tickets_ptr + tile, 0, sem="relaxed")  # so that the next launch starts at zero
        return acc, last


@triton.jit(do_not_specialize=["tokens", "out_stride_token"], launch_metadata=_cost)
def _tiled_kernel(
    x_ptr,  # [tokens, COLUMNS]
    planes,
    residual_ptr,  # as out; unread where ADD is false
    out_ptr,  # [tokens, rows]
    tickets_ptr,
    partials_ptr,  # [tiles, SPLITS, BLOCK_M, BLOCK_N]
    residual_stride_token,
    out_stride_token,
    tokens,
    rows,
    scale,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    CENTER: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    SPLITS: tl.constexpr,
    SETTLE: tl.constexpr,
):
    BLOCK_K: tl.constexpr = UNITS * 32
    CHUNK: tl.constexpr = (COLUMNS + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = COLUMNS == SPLITS * CHUNK
    blocks = tl.cdiv(tokens, BLOCK_M)
    split = tl.program_id(0) // blocks % SPLITS
    tile = tl.program_id(0) // (blocks * SPLITS) * blocks + tl.program_id(0) % blocks
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    token, row = tile % blocks * BLOCK_M + m, tile // blocks * BLOCK_N + n
    x_row = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * COLUMNS
    weight_row = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in tl.range(0, CHUNK, BLOCK_K):
        column = split * CHUNK + begin + tl.arange(0, BLOCK_K)[None, :]
        unit = (split * CHUNK + begin) // 32 + tl.arange(0, UNITS)[None, :]
        if EVEN:
            x = tl.load(x_row + column)
            values = tile_values(planes, weight_row, unit, None, COLUMNS, FORMAT, LOW, HIGH, GROUP, CENTER)
        else:
            x = tl.load(x_row + column, mask=column < COLUMNS, other=0.0)
            values = tile_values(planes, weight_row, unit, unit < COLUMNS // 32, COLUMNS, FORMAT, LOW, HIGH, GROUP, CENTER)
        values = values.to(x_ptr.dtype.element_ty)
        if SETTLE:
            values = _settled(values)
        acc = tl.dot(x, tl.trans(values), acc)

    acc, last = _meet(acc, tile, split, tickets_ptr, partials_ptr, SPLITS)
    if last:
        real, at = (token < tokens)[:, None] & (row < rows)[None, :], token.to(tl.int64)[:, None]
        if ADD:
            acc = tl.load(residual_ptr + at * residual_stride_token + row[None, :], mask=real, other=0.0).to(tl.float32) + acc * scale
        tl.store(out_ptr + at * out_stride_token + row[None, :], acc.to(out_ptr.dtype.element_ty), mask=real)


@operation("granite_kernels::tiled", mutates_args=("out", "tickets", "partials"))
def _tiled(
    x: Tensor, planes: Sequence[Tensor], format: str, residual: Tensor | None, out: Tensor, tickets: Tensor, partials: Tensor, scale: float
) -> None:
    (tokens, columns), rows, where = x.shape, out.shape[1], target(x)
    shape = tiled_launch(rows, columns, tokens, where)
    _tiled_kernel[(shape.tiles(rows, tokens) * shape.splits,)](
        x_ptr=x,
        planes=as_words(planes),
        residual_ptr=out if residual is None else residual,
        out_ptr=out,
        tickets_ptr=tickets,
        partials_ptr=partials,
        residual_stride_token=0 if residual is None else residual.stride(0),
        out_stride_token=out.stride(0),
        tokens=tokens,
        rows=rows,
        scale=scale,
        COLUMNS=columns,
        FORMAT=format,
        **constants(format),
        ADD=residual is not None,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        UNITS=shape.units,
        SPLITS=shape.splits,
        SETTLE=where.arch // 10 not in (9, 10),  # whose tensor cores read shared memory themselves
        num_warps=shape.warps,
        num_stages=shape.stages,
        enable_fp_fusion=True,
    )


@_tiled.register_fake
def _(
    x: Tensor, planes: Sequence[Tensor], format: str, residual: Tensor | None, out: Tensor, tickets: Tensor, partials: Tensor, scale: float
) -> None:
    return None


def tiled(x: Tensor, weight: Weight, *, residual: Tensor | None = None, scale: float = 1.0, workspace: Workspace | None = None) -> Tensor:
    """x [..., columns] @ weight.T, or residual + scale * that, for a weight of packed parts: [..., rows], one launch a part."""
    flat = x.reshape(-1, x.shape[-1])
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    results = out.view(flat.shape[0], -1).split([part.shape[0] for part in weight.parts], dim=1)
    residuals = [None] * len(results) if residual is None else residual.reshape(flat.shape[0], -1).split([r.shape[1] for r in results], 1)
    for part, result, added in zip(weight.parts, results, residuals, strict=True):
        need = workspace_size(part.shape, flat.shape[0], x)
        if workspace is None:
            scratch = Workspace.allocate(*need, x.device)
        else:
            workspace.need(*need)
            scratch = workspace
        _tiled(flat, list(part.planes), part.format, added, result, scratch.tickets, scratch.partials, scale)
    return out


def workspace_size(shape: tuple[int, int], tokens: int, like: Tensor) -> tuple[int, int]:
    """(tickets, partial sums) that the product of `tokens` tokens with a part of `shape` takes on the device of `like`."""
    return tiled_launch(*shape, tokens, target(like)).workspace(shape[0], tokens)
