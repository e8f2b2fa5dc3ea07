"""RMSNorm: y = round(x / sqrt(mean(x^2) + eps)) * weight, the mean and the quotient in float32.

x [rows, hidden], weight [hidden]. A program holds whole rows in registers, several where they are short: each value is read once
and written once, 4 bytes a value in 16 bits, 8 where a residual is added.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.launch import DTYPES, WIDEST_ROW, row_launch
from granite_kernels.operation import operation


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    values = args["rows"] * args["hidden"]
    tensors = 2 if "residual_ptr" not in args else 4
    return {"name": kernel.name, "flops": 4 * values, "bytes": args["x_ptr"].element_size() * (tensors * values + args["hidden"])}


@triton.jit
def _normed(x, weight, hidden, eps):
    """x [ROWS, HIDDEN] in its own dtype, zero behind `hidden` -> its norm, rounded before the weight and after."""
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / hidden + eps)
    return (wide * inverse[:, None]).to(x.dtype) * weight


@triton.jit(do_not_specialize=["rows"], launch_metadata=_cost)
def _rms_norm_kernel(
    x_ptr,  # [rows, hidden]
    weight_ptr,  # [hidden]
    out_ptr,  # [rows, hidden]
    rows,
    hidden,
    eps,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, HIDDEN)[None, :]
    inside = (row < rows) & (column < hidden)
    x = tl.load(x_ptr + row * hidden + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0)
    tl.store(out_ptr + row * hidden + column, _normed(x, weight, hidden, eps), mask=inside)


@triton.jit(do_not_specialize=["rows"], launch_metadata=_cost)
def _add_rms_norm_kernel(
    x_ptr,  # [rows, hidden]
    residual_ptr,  # [rows, hidden]
    weight_ptr,  # [hidden]
    out_ptr,  # [rows, hidden]
    added_ptr,  # [rows, hidden]
    rows,
    hidden,
    eps,
    scale,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, HIDDEN)[None, :]
    inside = (row < rows) & (column < hidden)
    x = tl.load(x_ptr + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0)
    added = (residual + x * scale).to(added_ptr.dtype.element_ty)
    tl.store(added_ptr + row * hidden + column, added, mask=inside)
    tl.store(out_ptr + row * hidden + column, _normed(added, weight, hidden, eps), mask=inside)


@operation("granite_kernels::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, hidden = x.shape
    out = torch.empty_like(x)
    shape = row_launch(rows, hidden)
    _rms_norm_kernel[(shape.programs(rows),)](
        x, weight, out, rows, hidden, eps, ROWS=shape.rows, HIDDEN=shape.width, num_warps=shape.warps, enable_fp_fusion=True
    )
    return out


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@operation("granite_kernels::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    rows, hidden = x.shape
    out, added = torch.empty_like(x), torch.empty_like(x)
    shape = row_launch(rows, hidden)
    _add_rms_norm_kernel[(shape.programs(rows),)](
        x,
        residual,
        weight,
        out,
        added,
        rows,
        hidden,
        eps,
        scale,
        ROWS=shape.rows,
        HIDDEN=shape.width,
        num_warps=shape.warps,
        enable_fp_fusion=True,
    )
    return out, added


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _check(weight: Tensor, *rows: Tensor) -> None:
    x = rows[0]
    if any(t.shape != x.shape for t in rows) or x.dim() == 0 or weight.shape != x.shape[-1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in rows)
        raise GraniteError(f"rows of shape {shapes} don't go with a weight of shape {tuple(weight.shape)}")
    if x.dtype not in DTYPES or any(t.dtype != x.dtype for t in (*rows, weight)):
        found = ", ".join(str(t.dtype) for t in (*rows, weight))
        raise GraniteError(f"rows and weight are {found}: expected one of float32, bfloat16, float16 for all")
    if x.shape[-1] > WIDEST_ROW:
        raise GraniteError(f"rows have {x.shape[-1]} columns, a program holds at most {WIDEST_ROW}")


def _rows(x: Tensor) -> Tensor:
    """x as contiguous rows: itself, wherever the model made it."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalise each row of x [..., hidden]; weight [hidden]. Returns x's shape and dtype.

    A row's bits do not depend on the others. Raises GraniteError.
    """
    _check(weight, x)
    out: Tensor = _rms_norm(_rows(x), weight.contiguous(), eps)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """residual' = residual + x * scale, and its norm: (rms_norm(residual'), residual'). x and residual [..., hidden].

    The sum is rounded once, and it is the rounded sum that is normed. A row's bits do not depend on the others. Raises GraniteError.
    """
    _check(weight, x, residual)
    out, added = _add_rms_norm(_rows(x), _rows(residual), weight.contiguous(), eps, scale)
    return out.view(x.shape), added.view(x.shape)
