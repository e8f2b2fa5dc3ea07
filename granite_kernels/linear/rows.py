"""Rows of a packed weight as a dense matrix: those that a gather asks for, or all, once, for the library's product.

    out[i] = weight[ids[i]] * multiplier

out [tokens, columns]; ids int64 [tokens], or None for every row in its order. Each packed byte is read once, each value written
once. Values are the format's `unpack` to the bit, rounded to the dtype of out before they meet the multiplier, as a dense
embedding's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.launch import decode_launch, target
from granite_kernels.linear.tiles import as_words, constants, tile_values
from granite_kernels.operation import operation
from granite_kernels.weight import Part


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    values, planes = args["rows"] * args["COLUMNS"], args["planes"]
    row = sum(plane.numel() * plane.element_size() for plane in planes) / planes[0].shape[0]
    return {"name": kernel.name, "flops": 2 * values, "bytes": args["rows"] * row + values * args["out_ptr"].element_size()}


@triton.jit(do_not_specialize=["rows"], launch_metadata=_cost)
def _rows_kernel(
    ids_ptr,  # int64 [rows]; unread where GATHER is false
    planes,
    out_ptr,  # [rows, COLUMNS]
    rows,
    multiplier,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    CENTER: tl.constexpr,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = (index < rows)[:, None]
    row = tl.load(ids_ptr + index, mask=index < rows, other=0) if GATHER else index
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    values = tile_values(planes, row[:, None], unit, real & (unit < COLUMNS // 32), COLUMNS, FORMAT, LOW, HIGH, GROUP, CENTER)
    values = values.to(out_ptr.dtype.element_ty)
    if GATHER:
        values = (values.to(tl.float32) * multiplier).to(out_ptr.dtype.element_ty)
    column = tl.program_id(1) * (UNITS * 32) + tl.arange(0, UNITS * 32)[None, :]
    tl.store(out_ptr + index[:, None] * COLUMNS + column, values, mask=real & (column < COLUMNS))


@operation("granite_kernels::decode_rows", mutates_args=())
def _decode_rows(
    ids: Tensor | None, planes: Sequence[Tensor], format: str, rows: int, columns: int, multiplier: float, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(rows, columns, dtype=dtype, device=planes[0].device)
    shape, pdl = decode_launch(gather=ids is not None), planes[0].is_cuda and target(planes[0]).arch >= 90
    _rows_kernel[(triton.cdiv(rows, shape.rows), triton.cdiv(columns // 32, shape.units))](
        ids_ptr=out if ids is None else ids,
        planes=as_words(planes),
        out_ptr=out,
        rows=rows,
        multiplier=multiplier,
        COLUMNS=columns,
        FORMAT=format,
        **constants(format),
        GATHER=ids is not None,
        ROWS=shape.rows,
        UNITS=shape.units,
        PDL=pdl,
        num_warps=shape.warps,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


@_decode_rows.register_fake
def _(ids: Tensor | None, planes: Sequence[Tensor], format: str, rows: int, columns: int, multiplier: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=planes[0].device)


def gather(ids: Tensor, part: Part, *, multiplier: float, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int64, any shape) of a packed part, times `multiplier`: [*ids.shape, columns] in `dtype`."""
    columns = part.shape[1]
    out: Tensor = _decode_rows(ids.reshape(-1), list(part.planes), part.format, ids.numel(), columns, multiplier, dtype)
    return out.view(*ids.shape, columns)


def unpack(part: Part, dtype: torch.dtype) -> Tensor:
    """All rows of a packed part: [rows, columns] in `dtype`."""
    out: Tensor = _decode_rows(None, list(part.planes), part.format, *part.shape, 1.0, dtype)
    return out
