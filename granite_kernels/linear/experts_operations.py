"""The launches of a step's experts as torch operations: flat schemas, fakes for torch.compile.

Common to both: planes and format of a weight [experts * rows, columns]; rows, of one expert; chosen int32 [..., top_k].
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from granite_kernels.launch import experts_launch, grouped_launch, target
from granite_kernels.linear.experts import _experts_down_add_kernel, _experts_gate_up_swiglu_kernel
from granite_kernels.linear.grouped import _combine_kernel, _grouped_kernel, _sort_choices_kernel
from granite_kernels.linear.launches import NEIGHBOURS, REGISTERS, pieces_of
from granite_kernels.linear.shape import Shape
from granite_kernels.operation import operation


def workspace_size(tokens: int, top_k: int, rows: int, columns: int, format: str) -> tuple[int, int]:
    """(tickets, partial sums) that `experts_down_add` of x [tokens, top_k, columns] and experts of `rows` rows needs."""
    return experts_launch(columns, tokens, format).blocks(rows, NEIGHBOURS), tokens * top_k * rows


def _launch(x: Tensor, planes: list[Tensor], format: str, experts: int, rows: int, chosen: Tensor, half: int) -> tuple[Any, dict[str, Any]]:
    """The grid, and the keywords that both kernels share."""
    top_k = chosen.shape[-1]
    columns, tokens, choices = x.shape[-1], chosen.numel() // top_k, chosen.numel()
    launch = experts_launch(columns, tokens, format)
    given, pieces = pieces_of(planes, [format], columns, launch.warps)
    shape = Shape(columns, tuple(pieces), launch.groups, launch.tokens, tokens == 1, launch.warps, 1, across=False, pdl=False)
    pdl = x.is_cuda and target(x).arch >= 90  # the kernels' own: where an expert's rows are is known behind the wait
    slots = min(choices, experts)
    keywords = dict(
        x_ptr=x,
        planes=tuple(given),
        chosen_ptr=chosen,
        tokens=tokens,
        slots=slots,
        experts=experts,
        rows=rows,
        TOP_K=top_k,
        PLACES=triton.next_power_of_2(top_k),
        BY_CHOICE=choices <= experts,
        SHAPE=shape,
        PDL=pdl,
        num_warps=launch.warps,
        enable_fp_fusion=True,
        maxnreg=REGISTERS,
        **({"launch_pdl": True} if pdl else {}),
    )
    return (launch.blocks(rows, half), slots), keywords


@operation("granite_kernels::experts_gate_up_swiglu", mutates_args=())
def experts_gate_up_swiglu(x: Tensor, planes: list[Tensor], format: str, experts: int, rows: int, chosen: Tensor) -> Tensor:
    out = x.new_empty(*chosen.shape, rows // 2)
    grid, keywords = _launch(x, planes, format, experts, rows, chosen, rows // 2)
    _experts_gate_up_swiglu_kernel[grid](out_ptr=out, **keywords)
    return out


@experts_gate_up_swiglu.register_fake
def _(x: Tensor, planes: list[Tensor], format: str, experts: int, rows: int, chosen: Tensor) -> Tensor:
    return x.new_empty(*chosen.shape, rows // 2)


@operation("granite_kernels::experts_down_add", mutates_args=("tickets", "partials"))
def experts_down_add(
    x: Tensor,
    planes: list[Tensor],
    format: str,
    experts: int,
    rows: int,
    chosen: Tensor,
    shares: Tensor,
    residual: Tensor,
    tickets: Tensor,
    partials: Tensor,
    scale: float,
) -> Tensor:
    out = residual.new_empty(residual.shape)
    grid, keywords = _launch(x, planes, format, experts, rows, chosen, NEIGHBOURS)
    _experts_down_add_kernel[grid](
        shares_ptr=shares, residual_ptr=residual, out_ptr=out, tickets_ptr=tickets, partials_ptr=partials, scale=scale, **keywords
    )
    return out


@experts_down_add.register_fake
def _(
    x: Tensor, planes: list[Tensor], format: str, experts: int, rows: int, chosen: Tensor, shares: Tensor, residual: Tensor, *rest: Any
) -> Tensor:
    return residual.new_empty(residual.shape)


# ------------------------------------------------------------------ many tokens


@operation("granite_kernels::sort_choices", mutates_args=())
def sort_choices(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(choices by expert int32 [choices], where each expert's begin int32 [experts + 1])."""
    choices = chosen.numel()
    order, starts = chosen.new_empty(choices), chosen.new_empty(experts + 1)
    _sort_choices_kernel[(experts,)](chosen, order, starts, choices, BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    return order, starts


@sort_choices.register_fake
def _(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return chosen.new_empty(chosen.numel()), chosen.new_empty(experts + 1)


def _grouped(
    x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, shares: Tensor, out: Tensor, *, top_k: int, swiglu: bool, scale: float
) -> None:
    experts, columns, choices = starts.numel() - 1, weight.shape[1], order.numel()
    rows = weight.shape[0] // experts
    width = rows // 2 if swiglu else rows
    shape = grouped_launch(choices, experts, x.dtype)
    block_n = shape.block_n if swiglu else 2 * shape.block_n  # of gate and of up, or of one product
    _grouped_kernel[(triton.cdiv(width, block_n), choices // shape.block_m + min(experts, choices))](
        x,
        weight,
        order,
        starts,
        shares,
        out,
        choices,
        experts,
        rows,
        columns,
        scale,
        TOP_K=top_k,
        SWIGLU=swiglu,
        EXPERTS=triton.next_power_of_2(experts),
        EVEN=columns % shape.block_k == 0,
        BLOCK_M=shape.block_m,
        BLOCK_N=block_n,
        BLOCK_K=shape.block_k,
        num_warps=shape.warps,
        num_stages=shape.stages,
        enable_fp_fusion=True,
    )


@operation("granite_kernels::grouped_gate_up_swiglu", mutates_args=())
def grouped_gate_up_swiglu(x: Tensor, weight: Tensor, chosen: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    out = x.new_empty(*chosen.shape, weight.shape[0] // (starts.numel() - 1) // 2)
    _grouped(x, weight, order, starts, order, out, top_k=chosen.shape[-1], swiglu=True, scale=1.0)
    return out


@grouped_gate_up_swiglu.register_fake
def _(x: Tensor, weight: Tensor, chosen: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty(*chosen.shape, weight.shape[0] // (starts.numel() - 1) // 2)


@operation("granite_kernels::grouped_down_add", mutates_args=())
def grouped_down_add(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, shares: Tensor, residual: Tensor, scale: float) -> Tensor:
    top_k, hidden = x.shape[-2], residual.shape[-1]
    added, out = x.new_empty(*x.shape[:-1], hidden), residual.new_empty(residual.shape)
    _grouped(x, weight, order, starts, shares, added, top_k=top_k, swiglu=False, scale=scale)
    _combine_kernel[(residual.numel() // hidden, triton.cdiv(hidden, 1024))](
        added, residual, out, hidden, TOP_K=top_k, BLOCK=min(triton.next_power_of_2(hidden), 1024), num_warps=4, enable_fp_fusion=True
    )
    return out


@grouped_down_add.register_fake
def _(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, shares: Tensor, residual: Tensor, *rest: Any) -> Tensor:
    return residual.new_empty(residual.shape)
