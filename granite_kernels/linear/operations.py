"""The launches of the matrix body as torch operations: one kernel for each epilogue, flat schemas, fakes for torch.compile.

Common to all: x [..., columns] contiguous; `planes` of a weight's parts, in the order of its rows; `formats`, their names joined by
"|"; `ends`, the row behind each; tickets and partials of a Workspace, which are as before afterwards and undefined, in this order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.linear.body import first_rows, meet, place, product
from granite_kernels.linear.epilogue import store_added, store_divided, store_rotated, store_swiglu
from granite_kernels.linear.launches import GATE_UP, NEIGHBOURS, arguments
from granite_kernels.linear.prologue import normed
from granite_kernels.operation import operation

STRIDES = ["k_cache_stride_batch", "k_cache_stride_head", "v_cache_stride_batch", "v_cache_stride_head"]


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    size, columns, tokens, rows = args["x_ptr"].element_size(), args["SHAPE"].columns, args["tokens"], args["rows"]
    written = rows // 2 if "swiglu" in kernel.name else rows
    moved = tokens * (columns + written + (rows if "residual_ptr" in args else 0)) + (columns if args.get("NORM") else 0)
    weight = sum(plane.numel() * plane.element_size() for plane in args["planes"])
    return {"name": kernel.name, "flops": 2 * tokens * rows * columns, "bytes": weight + size * moved}


@triton.jit(do_not_specialize=["tokens"], launch_metadata=_cost)
def _linear_kernel(
    x_ptr,  # [tokens, columns]
    norm_ptr,  # [columns]; unread where NORM is 0
    planes,
    out_ptr,  # [tokens, rows]
    tickets_ptr,
    partials_ptr,
    ends,
    tokens,
    rows,
    eps,
    scaling,
    NORM: tl.constexpr,
    SHAPE: tl.constexpr,
):
    block, split = tl.program_id(0) // SHAPE.splits, tl.program_id(0) % SHAPE.splits
    y, squares = product(x_ptr, norm_ptr, planes, ends, None, block, split, tokens, 0, 8, eps, NORM, SHAPE)
    y, squares, last = meet(y, squares, block, split, tickets_ptr, partials_ptr, NORM, SHAPE)
    if last:
        y = normed(y, squares, eps, SHAPE.columns, NORM)
        _, within, start, end = place(block, ends, 8, SHAPE)
        store_divided(y, start + within * (16 * SHAPE.groups), end, out_ptr, tokens, rows, scaling, SHAPE.groups, SHAPE.tokens)


@triton.jit(do_not_specialize=["tokens"], launch_metadata=_cost)
def _linear_add_kernel(
    x_ptr,  # [tokens, columns]
    planes,
    residual_ptr,  # [tokens, rows]
    out_ptr,  # [tokens, rows]
    tickets_ptr,
    partials_ptr,
    ends,
    tokens,
    rows,
    scale,
    SHAPE: tl.constexpr,
):
    block, split = tl.program_id(0) // SHAPE.splits, tl.program_id(0) % SHAPE.splits
    y, squares = product(x_ptr, x_ptr, planes, ends, None, block, split, tokens, 0, 8, 0.0, 0, SHAPE)
    y, squares, last = meet(y, squares, block, split, tickets_ptr, partials_ptr, 0, SHAPE)
    if last:
        _, within, start, end = place(block, ends, 8, SHAPE)
        first = start + within * (16 * SHAPE.groups)
        store_added(y, first, end, residual_ptr, out_ptr, tokens, rows, scale, SHAPE.groups, SHAPE.tokens)


@triton.jit(do_not_specialize=["tokens"], launch_metadata=_cost)
def _norm_gate_up_swiglu_kernel(
    x_ptr,  # [tokens, columns]
    norm_ptr,  # [columns]
    planes,  # rows = 2 * inner: gate | up
    out_ptr,  # [tokens, inner]
    tickets_ptr,
    partials_ptr,
    ends,
    tokens,
    rows,
    eps,
    NORM: tl.constexpr,
    SHAPE: tl.constexpr,
):
    inner = rows // 2
    block, split = tl.program_id(0) // SHAPE.splits, tl.program_id(0) % SHAPE.splits
    y, squares = product(x_ptr, norm_ptr, planes, ends, None, block, split, tokens, 0, None, eps, NORM, SHAPE)
    y, squares, last = meet(y, squares, block, split, tickets_ptr, partials_ptr, NORM, SHAPE)
    if last:
        y = normed(y, squares, eps, SHAPE.columns, NORM)
        store_swiglu(y, block, out_ptr, tokens, inner, SHAPE.groups, SHAPE.tokens)


@triton.jit(do_not_specialize=["tokens", "tokens_a_row", *STRIDES], launch_metadata=_cost)
def _norm_qkv_rope_append_kernel(
    x_ptr,  # [tokens, columns]
    norm_ptr,  # [columns]
    planes,  # rows q | k | v
    rotary_ptr,  # [positions, head_dim]: cos | sin
    positions_ptr,  # int32 [tokens]
    lengths_ptr,  # int32 [batch]
    q_ptr,  # [tokens, heads, head_dim]
    k_cache_ptr,  # [batch, kv_heads, context, head_dim]
    v_cache_ptr,  # as k_cache
    tickets_ptr,
    partials_ptr,
    ends,
    k_cache_stride_batch,
    k_cache_stride_head,
    v_cache_stride_batch,
    v_cache_stride_head,
    tokens,
    tokens_a_row,
    rows,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    SHAPE: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    block, split = tl.program_id(0) // SHAPE.splits, tl.program_id(0) % SHAPE.splits
    y, squares = product(x_ptr, norm_ptr, planes, ends, None, block, split, tokens, 0, HALF, eps, NORM, SHAPE)
    y, squares, last = meet(y, squares, block, split, tickets_ptr, partials_ptr, NORM, SHAPE)
    if last:
        y = normed(y, squares, eps, SHAPE.columns, NORM)
        _, within, start, end = place(block, ends, HALF, SHAPE)
        store_rotated(
            y, start + first_rows(within, HALF, SHAPE.groups), end, rotary_ptr, positions_ptr, lengths_ptr, q_ptr,
            k_cache_ptr, v_cache_ptr, k_cache_stride_batch, k_cache_stride_head, v_cache_stride_batch, v_cache_stride_head,
            tokens, tokens_a_row, HEADS, KV_HEADS, HEAD_DIM, SHAPE.groups, SHAPE.tokens,
        )  # fmt: skip


# ------------------------------------------------------------------ operations


@operation("granite_kernels::linear", mutates_args=("tickets", "partials"))
def linear(x: Tensor, planes: list[Tensor], formats: str, ends: list[int], tickets: Tensor, partials: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:-1], ends[-1])
    programs, common = arguments(x, planes, formats, ends, NEIGHBOURS, tickets, partials)
    _linear_kernel[(programs,)](norm_ptr=x, out_ptr=out, eps=0.0, scaling=1.0, **common | {"NORM": 0})
    return out


@linear.register_fake
def _(x: Tensor, planes: list[Tensor], formats: str, ends: list[int], *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], ends[-1])


@operation("granite_kernels::norm_logits", mutates_args=("tickets", "partials"))
def norm_logits(
    x: Tensor,
    norm: Tensor,
    planes: list[Tensor],
    formats: str,
    ends: list[int],
    tickets: Tensor,
    partials: Tensor,
    eps: float,
    scaling: float,
) -> Tensor:
    out = x.new_empty(*x.shape[:-1], ends[-1])
    programs, common = arguments(x, planes, formats, ends, NEIGHBOURS, tickets, partials)
    _linear_kernel[(programs,)](norm_ptr=norm, out_ptr=out, eps=eps, scaling=scaling, **common)
    return out


@norm_logits.register_fake
def _(x: Tensor, norm: Tensor, planes: list[Tensor], formats: str, ends: list[int], *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], ends[-1])


@operation("granite_kernels::linear_add", mutates_args=("tickets", "partials"))
def linear_add(
    x: Tensor, planes: list[Tensor], formats: str, ends: list[int], residual: Tensor, tickets: Tensor, partials: Tensor, scale: float
) -> Tensor:
    out = residual.new_empty(residual.shape)
    programs, common = arguments(x, planes, formats, ends, NEIGHBOURS, tickets, partials)
    del common["NORM"]
    _linear_add_kernel[(programs,)](residual_ptr=residual, out_ptr=out, scale=scale, **common)
    return out


@linear_add.register_fake
def _(x: Tensor, planes: list[Tensor], formats: str, ends: list[int], residual: Tensor, *rest: Any) -> Tensor:
    return residual.new_empty(residual.shape)


@operation("granite_kernels::norm_gate_up_swiglu", mutates_args=("tickets", "partials"))
def norm_gate_up_swiglu(
    x: Tensor, norm: Tensor, planes: list[Tensor], formats: str, ends: list[int], tickets: Tensor, partials: Tensor, eps: float
) -> Tensor:
    out = x.new_empty(*x.shape[:-1], ends[-1] // 2)
    programs, common = arguments(x, planes, formats, ends, GATE_UP, tickets, partials)
    _norm_gate_up_swiglu_kernel[(programs,)](norm_ptr=norm, out_ptr=out, eps=eps, **common)
    return out


@norm_gate_up_swiglu.register_fake
def _(x: Tensor, norm: Tensor, planes: list[Tensor], formats: str, ends: list[int], *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], ends[-1] // 2)


@operation("granite_kernels::norm_qkv_rope_append", mutates_args=("k_cache", "v_cache", "tickets", "partials"))
def norm_qkv_rope_append(
    x: Tensor,
    norm: Tensor,
    planes: list[Tensor],
    formats: str,
    ends: list[int],
    rotary: Tensor,
    positions: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tickets: Tensor,
    partials: Tensor,
    eps: float,
) -> Tensor:
    batch, tokens, _ = x.shape
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = ends[-1] // head_dim - 2 * kv_heads
    q = x.new_empty(batch, tokens, heads, head_dim)
    programs, common = arguments(x, planes, formats, ends, head_dim // 2, tickets, partials)
    _norm_qkv_rope_append_kernel[(programs,)](
        norm_ptr=norm,
        rotary_ptr=rotary,
        positions_ptr=positions,
        lengths_ptr=lengths,
        q_ptr=q,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        tokens_a_row=tokens,
        eps=eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        **dict(zip(STRIDES, (*k_cache.stride()[:2], *v_cache.stride()[:2]), strict=True)),
        **common,
    )
    return q


@norm_qkv_rope_append.register_fake
def _(
    x: Tensor,
    norm: Tensor,
    planes: list[Tensor],
    formats: str,
    ends: list[int],
    rotary: Tensor,
    positions: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tickets: Tensor,
    partials: Tensor,
    eps: float,
) -> Tensor:
    batch, tokens, _ = x.shape
    head_dim = k_cache.shape[3]
    return x.new_empty(batch, tokens, ends[-1] // head_dim - 2 * k_cache.shape[1], head_dim)
