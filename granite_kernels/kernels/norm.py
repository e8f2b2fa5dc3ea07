"""RMSNorm: y = round(x / sqrt(mean(x^2) + eps)) * norm, the mean and the quotient in float32.

x [rows, hidden], norm [hidden]. A program holds whole rows in registers: each value is read once and written once, 2 * 2 bytes in
16 bits (3 * 2 + 2 with the residual), and nothing is read twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.launch import row_launch


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    values = args["rows"] * args["hidden"]
    tensors = 2 if "residual_ptr" not in args else 4
    return {"name": kernel.name, "flops": 4 * values, "bytes": args["x_ptr"].element_size() * (tensors * values + args["hidden"])}


@triton.jit
def _normed(x, norm, hidden, eps):
    """x [ROWS, HIDDEN] in its own dtype, zero behind `hidden` -> its norm."""
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / hidden + eps)
    return (wide * inverse[:, None]).to(x.dtype) * norm


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
    norm = tl.load(weight_ptr + column, mask=column < hidden, other=0.0)
    tl.store(out_ptr + row * hidden + column, _normed(x, norm, hidden, eps), mask=inside)


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
    norm = tl.load(weight_ptr + column, mask=column < hidden, other=0.0)
    added = (residual + x * scale).to(added_ptr.dtype.element_ty)
    tl.store(added_ptr + row * hidden + column, added, mask=inside)
    tl.store(out_ptr + row * hidden + column, _normed(added, norm, hidden, eps), mask=inside)


@torch.library.custom_op("granite_kernels::rms_norm", mutates_args=())
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


@torch.library.custom_op("granite_kernels::add_rms_norm", mutates_args=())
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


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalise each row of x [..., hidden]; weight [hidden]. Returns x's shape and dtype."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}, x rows of {x.shape[-1]}")
    out: Tensor = _rms_norm(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """residual' = residual + x * scale, and its norm: (rms_norm(residual'), residual'). x and residual [..., hidden]."""
    if x.shape != residual.shape or weight.shape != x.shape[-1:]:
        raise ValueError(f"x {tuple(x.shape)}, residual {tuple(residual.shape)} and weight {tuple(weight.shape)} don't fit together")
    flat = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, residual))
    out, added = _add_rms_norm(*flat, weight, eps, scale)
    return out.view(x.shape), added.view(x.shape)
