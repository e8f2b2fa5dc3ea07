"""x @ weight.T alone and fused with its neighbours, for the few tokens of a decode step; larger products are composed.

Five launches a layer: the norm and the rotation, the residual, SwiGLU and the division of the logits happen in the program that
holds the numbers, so that between two matrices only [tokens, hidden] values pass through memory. The bytes of a launch are those
of its matrix, once, plus a few per cent (see linear/body.py). Sums are float32 and each result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.launch import MatrixLaunch, matrix_launch, target
from granite_kernels.linear import composed
from granite_kernels.linear.body import first_rows, meet, pairs, product
from granite_kernels.linear.regimes import is_skinny
from granite_kernels.weight import Weight
from granite_kernels.workspace import Workspace

ROWS = 8  # `half` of a matrix whose rows have no partners: sixteen neighbours a group


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    size, columns, tokens, rows = args["x_ptr"].element_size(), args["COLUMNS"], args["tokens"], args["rows"]
    return {"name": kernel.name, "flops": 2 * tokens * rows * columns, "bytes": size * (rows * columns + tokens * (columns + rows))}


@triton.jit(do_not_specialize=["tokens"], launch_metadata=_cost)
def _linear_kernel(
    x_ptr,  # [tokens, columns]
    norm_ptr,  # [columns]; unread where NORM is 0
    weight_ptr,  # [rows, columns]
    out_ptr,  # [tokens, rows]
    tickets_ptr,
    partials_ptr,
    tokens,
    rows,
    eps,
    scaling,
    COLUMNS: tl.constexpr,
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
    y = product(x_ptr, norm_ptr, weight_ptr, tokens, rows, 8, eps, COLUMNS, GROUPS, TOKENS, ONE, WARPS, SPLITS, UNROLL, KWIDTH, NORM, PDL)
    y, last = meet(y, tickets_ptr, partials_ptr, GROUPS, TOKENS, SPLITS)
    if last:
        row = (tl.program_id(0) // SPLITS).to(tl.int64) * (16 * GROUPS) + tl.arange(0, 16 * GROUPS)[:, None]
        token = tl.arange(0, TOKENS)[None, :].to(tl.int64)
        tl.store(out_ptr + token * rows + row, (y / scaling).to(out_ptr.dtype.element_ty), mask=(token < tokens) & (row < rows))


@triton.jit(do_not_specialize=["tokens"], launch_metadata=_cost)
def _linear_add_kernel(
    x_ptr,  # [tokens, columns]
    weight_ptr,  # [rows, columns]
    residual_ptr,  # [tokens, rows]
    out_ptr,  # [tokens, rows]
    tickets_ptr,
    partials_ptr,
    tokens,
    rows,
    scale,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ONE: tl.constexpr,
    WARPS: tl.constexpr,
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    KWIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    y = product(x_ptr, x_ptr, weight_ptr, tokens, rows, 8, 0.0, COLUMNS, GROUPS, TOKENS, ONE, WARPS, SPLITS, UNROLL, KWIDTH, 0, PDL)
    y, last = meet(y, tickets_ptr, partials_ptr, GROUPS, TOKENS, SPLITS)
    if last:
        row = (tl.program_id(0) // SPLITS).to(tl.int64) * (16 * GROUPS) + tl.arange(0, 16 * GROUPS)[:, None]
        token = tl.arange(0, TOKENS)[None, :].to(tl.int64)
        inside = (token < tokens) & (row < rows)
        residual = tl.load(residual_ptr + token * rows + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * rows + row, (residual + y * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"], launch_metadata=_cost)
def _norm_gate_up_swiglu_kernel(
    x_ptr,  # [tokens, columns]
    norm_ptr,  # [columns]
    weight_ptr,  # [rows, columns], rows = 2 * inner: gate | up
    out_ptr,  # [tokens, inner]
    tickets_ptr,
    partials_ptr,
    tokens,
    rows,
    eps,
    COLUMNS: tl.constexpr,
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
    y = product(
        x_ptr, norm_ptr, weight_ptr, tokens, rows, inner, eps, COLUMNS, GROUPS, TOKENS, ONE, WARPS, SPLITS, UNROLL, KWIDTH, NORM, PDL
    )
    y, last = meet(y, tickets_ptr, partials_ptr, GROUPS, TOKENS, SPLITS)
    if last:
        gate, up = pairs(y, GROUPS, TOKENS)
        row = (tl.program_id(0) // SPLITS).to(tl.int64) * (8 * GROUPS) + tl.arange(0, 8 * GROUPS)[:, None]
        token = tl.arange(0, TOKENS)[None, :].to(tl.int64)
        out = gate * tl.sigmoid(gate) * up
        tl.store(out_ptr + token * inner + row, out.to(out_ptr.dtype.element_ty), mask=(token < tokens) & (row < inner))


@triton.jit(
    do_not_specialize=[
        "tokens",
        "tokens_a_row",
        "k_cache_stride_batch",
        "k_cache_stride_head",
        "v_cache_stride_batch",
        "v_cache_stride_head",
    ],
    launch_metadata=_cost,
)
def _norm_qkv_rope_append_kernel(
    x_ptr,  # [tokens, columns]
    norm_ptr,  # [columns]
    weight_ptr,  # [rows, columns], rows q | k | v
    rotary_ptr,  # [positions, head_dim]: cos | sin
    positions_ptr,  # int32 [tokens]
    lengths_ptr,  # int32 [batch]
    q_ptr,  # [tokens, heads, head_dim]
    k_cache_ptr,  # [batch, kv_heads, context, head_dim]
    v_cache_ptr,  # as k_cache
    tickets_ptr,
    partials_ptr,
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
    y = product(
        x_ptr, norm_ptr, weight_ptr, tokens, rows, HALF, eps, COLUMNS, GROUPS, TOKENS, ONE, WARPS, SPLITS, UNROLL, KWIDTH, NORM, PDL
    )
    y, last = meet(y, tickets_ptr, partials_ptr, GROUPS, TOKENS, SPLITS)
    if last:
        a, b = pairs(y, GROUPS, TOKENS)
        row = first_rows(tl.program_id(0) // SPLITS, HALF, GROUPS)[:, None]
        head, at = row // HEAD_DIM, row % HEAD_DIM
        token = tl.arange(0, TOKENS)[None, :]
        real = token < tokens
        sequence = token // tokens_a_row
        slot = tl.load(lengths_ptr + sequence, mask=real, other=0).to(tl.int64) + token % tokens_a_row
        turn = rotary_ptr + tl.load(positions_ptr + token, mask=real, other=0).to(tl.int64) * HEAD_DIM + at
        turned = real & (head < HEADS + KV_HEADS)
        cos = tl.load(turn, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(turn + HALF, mask=turned, other=0.0).to(tl.float32)
        first, second = (a * cos - b * sin).to(q_ptr.dtype.element_ty), (b * cos + a * sin).to(q_ptr.dtype.element_ty)
        q = q_ptr + (token.to(tl.int64) * HEADS + head) * HEAD_DIM + at
        is_q = real & (head < HEADS)
        tl.store(q, first, mask=is_q)
        tl.store(q + HALF, second, mask=is_q)
        is_k = real & (head >= HEADS) & (head < HEADS + KV_HEADS)
        k = k_cache_ptr + sequence.to(tl.int64) * k_cache_stride_batch + (head - HEADS) * k_cache_stride_head + slot * HEAD_DIM + at
        tl.store(k, first, mask=is_k)
        tl.store(k + HALF, second, mask=is_k)
        kv = head - HEADS - KV_HEADS
        is_v = real & (kv >= 0) & (kv < KV_HEADS)
        v = v_cache_ptr + sequence.to(tl.int64) * v_cache_stride_batch + kv * v_cache_stride_head + slot * HEAD_DIM + at
        tl.store(v, first, mask=is_v)
        tl.store(v + HALF, second, mask=is_v)


# ------------------------------------------------------------------ launches


def _plan(x: Tensor, weight: Tensor, half: int, workspace: Workspace | None) -> tuple[MatrixLaunch, int, Workspace, dict[str, Any]]:
    """(launch shape, programs, workspace, the keywords that all kernels share) for x [..., columns] and a dense weight."""
    rows, columns = weight.shape
    tokens = x.shape[:-1].numel()
    where = target(x)
    shape = matrix_launch(rows, columns, tokens, where)
    need = shape.workspace(rows, half)
    if workspace is None:
        workspace = Workspace.allocate(max(need[0], 1), max(need[1], 1), x.device)
    workspace.need(*need)
    pdl = x.is_cuda and where.arch >= 90
    keywords = dict(
        COLUMNS=columns,
        GROUPS=shape.groups,
        TOKENS=shape.tokens,
        ONE=tokens == 1,
        WARPS=shape.warps,
        SPLITS=shape.splits,
        UNROLL=shape.unroll,
        KWIDTH=2,
        PDL=pdl,
        num_warps=shape.warps,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if pdl else {}),
    )
    return shape, shape.blocks(rows, half) * shape.splits, workspace, keywords


def _norm_kind(x: Tensor) -> int:
    return 1 if x.dtype == torch.bfloat16 else 2  # float16 could overflow, float32 should see what the model sees


def _check(x: Tensor, weight: Weight) -> None:
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {weight.shape[1]}")
    if x.dtype == torch.float64:
        raise ValueError("kernels take float32, bfloat16 and float16; float64 is the reference's")


def _matrix(weight: Weight) -> Tensor:
    plane = weight.parts[0].planes[0]
    if not plane.is_contiguous():
        raise ValueError("kernels read matrices whose rows are contiguous")
    return plane


def linear(x: Tensor, weight: Weight, *, workspace: Workspace | None = None) -> Tensor:
    """x [..., columns] @ weight.T: [..., rows]."""
    _check(x, weight)
    if not is_skinny(x, weight):
        return composed.linear(x, weight)
    x, matrix = x.contiguous(), _matrix(weight)
    _, programs, work, keywords = _plan(x, matrix, ROWS, workspace)
    out = x.new_empty(*x.shape[:-1], matrix.shape[0])
    tokens = x.shape[:-1].numel()
    _linear_kernel[(programs,)](x, x, matrix, out, work.tickets, work.partials, tokens, matrix.shape[0], 0.0, 1.0, NORM=0, **keywords)
    return out


def norm_logits(x: Tensor, norm: Tensor, weight: Weight, *, eps: float, scaling: float, workspace: Workspace | None = None) -> Tensor:
    """Logits [..., vocab] of the normed x, divided by `scaling` (Granite's logits_scaling)."""
    _check(x, weight)
    if not is_skinny(x, weight):
        return composed.norm_logits(x, norm, weight, eps=eps, scaling=scaling)
    x, matrix = x.contiguous(), _matrix(weight)
    _, programs, work, keywords = _plan(x, matrix, ROWS, workspace)
    out = x.new_empty(*x.shape[:-1], matrix.shape[0])
    tokens, kind = x.shape[:-1].numel(), _norm_kind(x)
    _linear_kernel[(programs,)](
        x, norm, matrix, out, work.tickets, work.partials, tokens, matrix.shape[0], eps, scaling, NORM=kind, **keywords
    )
    return out


def linear_add(x: Tensor, weight: Weight, residual: Tensor, *, scale: float, workspace: Workspace | None = None) -> Tensor:
    """residual + (x @ weight.T) * scale: a branch joins the stream. residual [..., rows]."""
    _check(x, weight)
    if not is_skinny(x, weight):
        return composed.linear_add(x, weight, residual, scale=scale)
    x, residual, matrix = x.contiguous(), residual.contiguous(), _matrix(weight)
    _, programs, work, keywords = _plan(x, matrix, ROWS, workspace)
    out = torch.empty_like(residual)
    tokens = x.shape[:-1].numel()
    _linear_add_kernel[(programs,)](x, matrix, residual, out, work.tickets, work.partials, tokens, matrix.shape[0], scale, **keywords)
    return out


def norm_gate_up_swiglu(x: Tensor, norm: Tensor, weight: Weight, *, eps: float, workspace: Workspace | None = None) -> Tensor:
    """silu(gate) * up of the normed x: weight [2 * inner, hidden], rows gate | up. Returns [..., inner]."""
    _check(x, weight)
    if not is_skinny(x, weight):
        return composed.norm_gate_up_swiglu(x, norm, weight, eps=eps)
    x, matrix = x.contiguous(), _matrix(weight)
    inner = matrix.shape[0] // 2
    _, programs, work, keywords = _plan(x, matrix, inner, workspace)
    out = x.new_empty(*x.shape[:-1], inner)
    tokens, kind = x.shape[:-1].numel(), _norm_kind(x)
    _norm_gate_up_swiglu_kernel[(programs,)](
        x, norm, matrix, out, work.tickets, work.partials, tokens, matrix.shape[0], eps, NORM=kind, **keywords
    )
    return out


def norm_qkv_rope_append(
    x: Tensor,
    norm: Tensor,
    weight: Weight,
    rotary: Tensor,
    positions: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    eps: float,
    workspace: Workspace | None = None,
) -> Tensor:
    """Norm, the q|k|v product, rotation of q and k, and the write of k and v into the cache. Returns q.

    Shapes as in granite_kernels.reference.linear.norm_qkv_rope_append; slots of the cache are contiguous rows of head_dim.
    """
    _check(x, weight)
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if k_cache.stride()[2:] != (head_dim, 1) or v_cache.stride()[2:] != (head_dim, 1):
        raise ValueError("the slots of a cache must be contiguous rows of head_dim")
    if not is_skinny(x, weight):
        return composed.norm_qkv_rope_append(x, norm, weight, rotary, positions, lengths, k_cache, v_cache, eps=eps)
    batch, tokens_a_row, _ = x.shape
    x, matrix, positions = x.contiguous(), _matrix(weight), positions.contiguous()
    heads = matrix.shape[0] // head_dim - 2 * kv_heads
    _, programs, work, keywords = _plan(x, matrix, head_dim // 2, workspace)
    q = x.new_empty(batch, tokens_a_row, heads, head_dim)
    _norm_qkv_rope_append_kernel[(programs,)](
        x,
        norm,
        matrix,
        rotary,
        positions,
        lengths,
        q,
        k_cache,
        v_cache,
        work.tickets,
        work.partials,
        *k_cache.stride()[:2],
        *v_cache.stride()[:2],
        batch * tokens_a_row,
        tokens_a_row,
        matrix.shape[0],
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        NORM=_norm_kind(x),
        **keywords,
    )
    return q
