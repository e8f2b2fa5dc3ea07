"""The launches of the matrix body as torch operations: one kernel for each epilogue, flat schemas, fakes for torch.compile.

Common to all: x [..., columns] contiguous; planes, the one to three dense matrices [rows_i, columns] of a weight, in the order of
its rows; tickets and partials of a Workspace, which are as before afterwards and undefined, in this order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.launch import matrix_launch, target
from granite_kernels.linear.body import first_rows, meet, product
from granite_kernels.linear.epilogue import store_added, store_divided, store_rotated, store_swiglu
from granite_kernels.linear.prologue import normed
from granite_kernels.linear.regimes import EIGHT_BITS
from granite_kernels.weight import DENSE

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
NEIGHBOURS = 8  # `half` of a matrix whose rows have no partners: sixteen neighbours a group
STRIDES = ["k_cache_stride_batch", "k_cache_stride_head", "v_cache_stride_batch", "v_cache_stride_head"]


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    size, columns, tokens, rows = args["x_ptr"].element_size(), args["COLUMNS"], args["tokens"], args["rows"]
    written = rows // 2 if "swiglu" in kernel.name else rows
    read = tokens * (columns + (rows if "residual_ptr" in args else 0)) + (columns if "norm_ptr" in args and args["NORM"] else 0)
    return {"name": kernel.name, "flops": 2 * tokens * rows * columns, "bytes": size * (rows * columns + read + tokens * written)}


@triton.jit(do_not_specialize=["tokens"], launch_metadata=_cost)
def _linear_kernel(
    x_ptr,  # [tokens, columns]
    norm_ptr,  # [columns]; unread where NORM is 0
    planes,  # one to three of [rows_i, columns]
    out_ptr,  # [tokens, rows]
    tickets_ptr,
    partials_ptr,
    ends,  # the row behind the first part, and behind the second
    tokens,
    rows,
    eps,
    scaling,
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
    y, squares = product(
        x_ptr, norm_ptr, planes, ends, tokens, rows, 8, eps,
        COLUMNS, FORMAT, PARTS, GROUPS, TOKENS, ONE, WARPS, SPLITS, UNROLL, KWIDTH, NORM, PDL,
    )  # fmt: skip
    y, squares, last = meet(y, squares, tickets_ptr, partials_ptr, GROUPS, TOKENS, SPLITS, NORM)
    if last:
        y = normed(y, squares, eps, COLUMNS, NORM)
        store_divided(y, tl.program_id(0) // SPLITS, out_ptr, tokens, rows, scaling, GROUPS, TOKENS)


@triton.jit(do_not_specialize=["tokens"], launch_metadata=_cost)
def _linear_add_kernel(
    x_ptr,  # [tokens, columns]
    planes,  # one to three of [rows_i, columns]
    residual_ptr,  # [tokens, rows]
    out_ptr,  # [tokens, rows]
    tickets_ptr,
    partials_ptr,
    ends,
    tokens,
    rows,
    scale,
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
    PDL: tl.constexpr,
):
    y, squares = product(
        x_ptr, x_ptr, planes, ends, tokens, rows, 8, 0.0,
        COLUMNS, FORMAT, PARTS, GROUPS, TOKENS, ONE, WARPS, SPLITS, UNROLL, KWIDTH, 0, PDL,
    )  # fmt: skip
    y, _, last = meet(y, squares, tickets_ptr, partials_ptr, GROUPS, TOKENS, SPLITS, 0)
    if last:
        store_added(y, tl.program_id(0) // SPLITS, residual_ptr, out_ptr, tokens, rows, scale, GROUPS, TOKENS)


@triton.jit(do_not_specialize=["tokens"], launch_metadata=_cost)
def _norm_gate_up_swiglu_kernel(
    x_ptr,  # [tokens, columns]
    norm_ptr,  # [columns]
    planes,  # one to three of [rows_i, columns], rows = 2 * inner: gate | up
    out_ptr,  # [tokens, inner]
    tickets_ptr,
    partials_ptr,
    ends,
    tokens,
    rows,
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
    inner = rows // 2
    y, squares = product(
        x_ptr, norm_ptr, planes, ends, tokens, rows, inner, eps,
        COLUMNS, FORMAT, PARTS, GROUPS, TOKENS, ONE, WARPS, SPLITS, UNROLL, KWIDTH, NORM, PDL,
    )  # fmt: skip
    y, squares, last = meet(y, squares, tickets_ptr, partials_ptr, GROUPS, TOKENS, SPLITS, NORM)
    if last:
        y = normed(y, squares, eps, COLUMNS, NORM)
        store_swiglu(y, tl.program_id(0) // SPLITS, out_ptr, tokens, inner, GROUPS, TOKENS)


@triton.jit(do_not_specialize=["tokens", "tokens_a_row", *STRIDES], launch_metadata=_cost)
def _norm_qkv_rope_append_kernel(
    x_ptr,  # [tokens, columns]
    norm_ptr,  # [columns]
    planes,  # one to three of [rows_i, columns], rows q | k | v
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
    HALF: tl.constexpr = HEAD_DIM // 2
    y, squares = product(
        x_ptr, norm_ptr, planes, ends, tokens, rows, HALF, eps,
        COLUMNS, FORMAT, PARTS, GROUPS, TOKENS, ONE, WARPS, SPLITS, UNROLL, KWIDTH, NORM, PDL,
    )  # fmt: skip
    y, squares, last = meet(y, squares, tickets_ptr, partials_ptr, GROUPS, TOKENS, SPLITS, NORM)
    if last:
        y = normed(y, squares, eps, COLUMNS, NORM)
        row = first_rows(tl.program_id(0) // SPLITS, HALF, GROUPS)
        store_rotated(
            y, row, rotary_ptr, positions_ptr, lengths_ptr, q_ptr, k_cache_ptr, v_cache_ptr,
            k_cache_stride_batch, k_cache_stride_head, v_cache_stride_batch, v_cache_stride_head,
            tokens, tokens_a_row, HEADS, KV_HEADS, HEAD_DIM, GROUPS, TOKENS,
        )  # fmt: skip


# ------------------------------------------------------------------ launches


def workspace_size(rows: int, half: int, x: Tensor, format: str = DENSE) -> tuple[int, int]:
    """(tickets, partial sums) of a product of x [..., columns] with `rows` rows whose pairs are `half` apart."""
    return matrix_launch(rows, x.shape[-1], x.shape[:-1].numel(), target(x), format).workspace(rows, half)


def _kwidth(format: str) -> int:
    """Consecutive k that a thread holds in the dot operand which Triton chooses; another value is right, but moves registers."""
    if format == DENSE:
        return 2
    if format in EIGHT_BITS:
        return 4
    return 4 if TRITON < (3, 8) else 2


def _launch(x: Tensor, planes: list[Tensor], format: str, rows: int, half: int) -> tuple[int, dict[str, Any]]:
    """The number of programs, and the keywords that all kernels share."""
    columns, tokens = x.shape[-1], x.shape[:-1].numel()
    where = target(x)
    shape = matrix_launch(rows, columns, tokens, where, format)
    pdl = x.is_cuda and where.arch >= 90
    first = planes[0].shape[0]
    second = first + planes[1].shape[0] if len(planes) > 1 else first
    keywords = dict(
        planes=tuple(planes),
        ends=(first, second),
        tokens=tokens,
        rows=rows,
        COLUMNS=columns,
        FORMAT=format,
        PARTS=len(planes) if format == DENSE else 1,
        GROUPS=shape.groups,
        TOKENS=shape.tokens,
        ONE=tokens == 1,
        WARPS=shape.warps,
        SPLITS=shape.splits,
        UNROLL=shape.unroll,
        KWIDTH=_kwidth(format),
        PDL=pdl,
        num_warps=shape.warps,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if pdl else {}),
    )
    return shape.blocks(rows, half) * shape.splits, keywords


def _norm_kind(x: Tensor) -> int:
    return 1 if x.dtype == torch.bfloat16 else 2  # float16 could overflow, float32 should see what the model sees


@torch.library.custom_op("granite_kernels::linear", mutates_args=("tickets", "partials"))
def linear(x: Tensor, planes: list[Tensor], format: str, rows: int, tickets: Tensor, partials: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:-1], rows)
    programs, keywords = _launch(x, planes, format, rows, NEIGHBOURS)
    _linear_kernel[(programs,)](
        x_ptr=x, norm_ptr=x, out_ptr=out, tickets_ptr=tickets, partials_ptr=partials, eps=0.0, scaling=1.0, NORM=0, **keywords
    )
    return out


@linear.register_fake
def _(x: Tensor, planes: list[Tensor], format: str, rows: int, tickets: Tensor, partials: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("granite_kernels::norm_logits", mutates_args=("tickets", "partials"))
def norm_logits(
    x: Tensor, norm: Tensor, planes: list[Tensor], format: str, rows: int, tickets: Tensor, partials: Tensor, eps: float, scaling: float
) -> Tensor:
    out = x.new_empty(*x.shape[:-1], rows)
    programs, keywords = _launch(x, planes, format, rows, NEIGHBOURS)
    _linear_kernel[(programs,)](
        x_ptr=x,
        norm_ptr=norm,
        out_ptr=out,
        tickets_ptr=tickets,
        partials_ptr=partials,
        eps=eps,
        scaling=scaling,
        NORM=_norm_kind(x),
        **keywords,
    )
    return out


@norm_logits.register_fake
def _(
    x: Tensor, norm: Tensor, planes: list[Tensor], format: str, rows: int, tickets: Tensor, partials: Tensor, eps: float, scaling: float
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("granite_kernels::linear_add", mutates_args=("tickets", "partials"))
def linear_add(
    x: Tensor, planes: list[Tensor], format: str, rows: int, residual: Tensor, tickets: Tensor, partials: Tensor, scale: float
) -> Tensor:
    out = residual.new_empty(residual.shape)
    programs, keywords = _launch(x, planes, format, rows, NEIGHBOURS)
    _linear_add_kernel[(programs,)](
        x_ptr=x, residual_ptr=residual, out_ptr=out, tickets_ptr=tickets, partials_ptr=partials, scale=scale, **keywords
    )
    return out


@linear_add.register_fake
def _(x: Tensor, planes: list[Tensor], format: str, rows: int, residual: Tensor, tickets: Tensor, partials: Tensor, scale: float) -> Tensor:
    return residual.new_empty(residual.shape)


@torch.library.custom_op("granite_kernels::norm_gate_up_swiglu", mutates_args=("tickets", "partials"))
def norm_gate_up_swiglu(
    x: Tensor, norm: Tensor, planes: list[Tensor], format: str, rows: int, tickets: Tensor, partials: Tensor, eps: float
) -> Tensor:
    inner = rows // 2
    out = x.new_empty(*x.shape[:-1], inner)
    programs, keywords = _launch(x, planes, format, rows, inner)
    _norm_gate_up_swiglu_kernel[(programs,)](
        x_ptr=x, norm_ptr=norm, out_ptr=out, tickets_ptr=tickets, partials_ptr=partials, eps=eps, NORM=_norm_kind(x), **keywords
    )
    return out


@norm_gate_up_swiglu.register_fake
def _(x: Tensor, norm: Tensor, planes: list[Tensor], format: str, rows: int, tickets: Tensor, partials: Tensor, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows // 2)


@torch.library.custom_op("granite_kernels::norm_qkv_rope_append", mutates_args=("k_cache", "v_cache", "tickets", "partials"))
def norm_qkv_rope_append(
    x: Tensor,
    norm: Tensor,
    planes: list[Tensor],
    format: str,
    rows: int,
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
    heads = rows // head_dim - 2 * kv_heads
    q = x.new_empty(batch, tokens, heads, head_dim)
    programs, keywords = _launch(x, planes, format, rows, head_dim // 2)
    strides = dict(zip(STRIDES, (*k_cache.stride()[:2], *v_cache.stride()[:2]), strict=True))
    _norm_qkv_rope_append_kernel[(programs,)](
        x_ptr=x,
        norm_ptr=norm,
        rotary_ptr=rotary,
        positions_ptr=positions,
        lengths_ptr=lengths,
        q_ptr=q,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        tickets_ptr=tickets,
        partials_ptr=partials,
        tokens_a_row=tokens,
        eps=eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        NORM=_norm_kind(x),
        **strides,
        **keywords,
    )
    return q


@norm_qkv_rope_append.register_fake
def _(
    x: Tensor,
    norm: Tensor,
    planes: list[Tensor],
    format: str,
    rows: int,
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
    return x.new_empty(batch, tokens, rows // head_dim - 2 * k_cache.shape[1], head_dim)
