"""Causal grouped-query attention for the few query tokens of a decode step, the cache split over programs.

    softmax(scale * q k^T) v,   at most 16 tokens over the batch, query t of row b seeing slots starts[b] .. lengths[b] + t

The heads that share a kv head are the rows of one product, so a slot is read once for the whole group. Up to num_programs(0)
programs share a sequence's slots in spans of whole tiles, computed from the lengths in device memory: a captured graph replays
while the cache grows. A program beyond the last span leaves at once; where one span is enough its program is done alone; else each
leaves its sums in the workspace and the last by ticket joins them in the order of the spans.

Reads k and v once, [batch, kv_heads, length, head_dim] each; partial sums are (head_dim + 2) floats a head and span.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.errors import GraniteError
from granite_kernels.kernels.attention import SIZES, attend_span, cache_offset, check
from granite_kernels.launch import DECODE_TOKENS, INTERPRETED, Target, attention_decode_launch, target
from granite_kernels.workspace import Workspace


@triton.jit
def join(sums_ptr, weights_ptr, active, first, rows, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, SPANS: tl.constexpr):
    """Softmax sums of `active` spans into one: sums [spans, rows, HEAD_DIM], weights [spans, rows, 2] (peak, total).

    Returns float32 [BLOCK_R, HEAD_DIM], from row `first` on. SPANS at a time, for the sake of one long wait instead of many.
    """
    span = tl.arange(0, SPANS)[:, None]
    row = first + tl.arange(0, BLOCK_R)[None, :]
    acc = tl.zeros((BLOCK_R, HEAD_DIM), tl.float32)
    peak = tl.full((BLOCK_R,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for begin in range(0, active, SPANS):
        real = (begin + span < active) & (row < rows)
        at = (begin + span) * rows + row
        sums = tl.load(
            sums_ptr + at[:, :, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, None, :],
            mask=real[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        peaks = tl.load(weights_ptr + at * 2, mask=real, other=-3.0e38, cache_modifier=".cg")
        totals = tl.load(weights_ptr + at * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(peaks, 0))
        fade, weight = tl.exp2(peak - higher), tl.exp2(peaks - higher[None, :])
        acc = acc * fade[:, None] + tl.sum(sums * weight[:, :, None], 0)
        total = total * fade + tl.sum(totals * weight, 0)
        peak = higher
    return acc / tl.where(total > 0, total, 1.0)[:, None]


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Of q and out alone: how much the cache holds is known to the device alone."""
    rows = grid[1] * grid[2] // args["BLOCKS"] * args["tokens"] * args["GROUP"]
    return {"name": kernel.name, "flops": 0, "bytes": 2 * rows * args["HEAD_DIM"] * args["q_ptr"].element_size()}


@triton.jit(do_not_specialize=SIZES, launch_metadata=_cost)
def _attention_decode_kernel(
    q_ptr,  # [batch, tokens, heads, HEAD_DIM]
    k_cache_ptr,  # [batch, kv_heads, context, HEAD_DIM]
    v_cache_ptr,  # as k_cache
    lengths_ptr,  # int32 [batch]
    starts_ptr,  # int32 [batch]
    out_ptr,  # [batch, tokens, heads, HEAD_DIM], contiguous
    tickets_ptr,  # int32 [batch, kv_heads, BLOCKS]
    sums_ptr,  # [batch, kv_heads, splits, tokens * GROUP, HEAD_DIM]
    weights_ptr,  # [batch, kv_heads, splits, tokens * GROUP, 2]
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    cache_stride_batch,
    cache_stride_head,
    tokens,
    factor,  # scale * log2(e)
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPANS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch, block = (tl.program_id(2) // BLOCKS).to(tl.int64), tl.program_id(2) % BLOCKS
    start = tl.load(starts_ptr + batch)
    before = tl.load(lengths_ptr + batch) - start  # slots that count, ahead of token 0; negative where token 0 is padding

    end = tl.maximum(before + tokens, 0)
    tiles = tl.cdiv(end, BLOCK_N)
    span = tl.maximum(tl.cdiv(tiles, tl.num_programs(0)), 1) * BLOCK_N
    active = tl.maximum(tl.cdiv(end, span), 1)
    if split >= active:
        return

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    real = (token < tokens)[:, None]
    d = tl.arange(0, HEAD_DIM)[None, :]
    from_q = tl.multiple_of(q_stride_batch.to(tl.int64), 16) * batch + tl.multiple_of(q_stride_token.to(tl.int64), 16) * token
    from_q += tl.multiple_of(q_stride_head.to(tl.int64), 16) * head
    q = tl.load(q_ptr + from_q[:, None] + d, mask=real, other=0.0)

    begin, stop = split * span, tl.minimum(split * span + span, end)
    cache = cache_offset(batch, kv_head, start, cache_stride_batch, cache_stride_head, HEAD_DIM)
    acc, peak, total = attend_span(
        q, k_cache_ptr + cache, v_cache_ptr + cache, before + token, begin, begin, stop, factor, HEAD_DIM, BLOCK_M, BLOCK_N
    )

    to = (batch * tokens + token) * (tl.num_programs(1) * GROUP) + head
    if active == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # a row that sees nothing yields zeros
        tl.store(out_ptr + to[:, None] * HEAD_DIM + d, acc.to(out_ptr.dtype.element_ty), mask=real)
        return

    rows = tokens * GROUP
    pair = batch * tl.num_programs(1) + kv_head
    room = pair * tl.num_programs(0) * rows
    own = room + split * rows + row
    tl.store(sums_ptr + own[:, None] * HEAD_DIM + d, acc, mask=real)
    tl.store(weights_ptr + own * 2, peak, mask=row < rows)
    tl.store(weights_ptr + own * 2 + 1, total, mask=row < rows)
    tl.debug_barrier()  # every thread's stores come before the ticket
    ticket = tickets_ptr + pair * BLOCKS + block
    if tl.atomic_add(ticket, 1, sem="acq_rel") == active - 1:
        tl.atomic_xchg(ticket, 0, sem="relaxed")  # so that the next launch, or a replayed graph, starts at zero
        first = block * BLOCK_M
        joined = join(sums_ptr + room * HEAD_DIM, weights_ptr + room * 2, active, first, rows, HEAD_DIM, BLOCK_R, SPANS)
        few = first + tl.arange(0, BLOCK_R)
        out = (batch * tokens + few // GROUP) * (tl.num_programs(1) * GROUP) + kv_head * GROUP + few % GROUP
        tl.store(out_ptr + out[:, None] * HEAD_DIM + d, joined.to(out_ptr.dtype.element_ty), mask=(few < rows)[:, None])


# ------------------------------------------------------------------ launch


def workspace_size(batch: int, kv_heads: int, group: int, head_dim: int, tokens: int, where: Target = INTERPRETED) -> tuple[int, int]:
    """(tickets, partials) that a call with these sizes may need on `where`, for every cache dtype and length."""
    rows = tokens * group
    splits = attention_decode_launch(rows, kv_heads, head_dim, torch.bfloat16, where).splits
    return batch * kv_heads * triton.cdiv(rows, 16), batch * kv_heads * splits * rows * (head_dim + 2)


@torch.library.custom_op("granite_kernels::attention_decode", mutates_args=("tickets", "partials"))
def _attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor, tickets: Tensor, partials: Tensor, scale: float
) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    group = heads // kv_heads
    rows = tokens * group
    where = target(q)
    shape = attention_decode_launch(rows, kv_heads, head_dim, q.dtype, where)
    blocks = triton.cdiv(rows, shape.block_m)
    block_r = min(triton.next_power_of_2(group), shape.block_m) if tokens == 1 else shape.block_m  # three kernels serve all tokens
    sums = batch * kv_heads * shape.splits * rows * head_dim
    pdl = q.is_cuda and where.arch >= 90
    _attention_decode_kernel[(shape.splits, kv_heads, batch * blocks)](
        q,
        k_cache,
        v_cache,
        lengths,
        starts,
        out,
        tickets,
        partials,
        partials[sums:],
        *q.stride()[:3],
        *k_cache.stride()[:2],
        tokens,
        scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        GROUP=group,
        BLOCKS=blocks,
        BLOCK_R=block_r,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        SPANS=max(4096 // (block_r * head_dim), 1),
        PDL=pdl,
        num_warps=shape.warps,
        num_stages=shape.stages,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


@_attention_decode.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor, tickets: Tensor, partials: Tensor, scale: float
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor,
    *,
    scale: float,
    workspace: Workspace | None = None,
) -> Tensor:
    """As `granite_kernels.kernels.attention.attention`, for batch * tokens of 1 to 16 over a long cache.

    Deterministic. A row's bits depend on its own slots, the tokens of the call and the GPU model, never on the rest of the batch,
    on padding or on the context that the cache has room for. workspace: at least `workspace_size(...)`; None allocates one.
    """
    check(q, k_cache, v_cache, lengths, starts)
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    if batch * tokens > DECODE_TOKENS:
        raise GraniteError(f"{batch} rows of {tokens} tokens: attention_decode takes {DECODE_TOKENS} together, use attention")
    need = workspace_size(batch, kv_heads, heads // kv_heads, head_dim, tokens, target(q))
    if workspace is None:
        workspace = Workspace.allocate(*need, q.device)
    workspace.need(*need)
    return _attention_decode(q, k_cache, v_cache, lengths, starts, workspace.tickets, workspace.partials, scale)
