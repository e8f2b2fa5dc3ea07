"""Causal grouped-query attention for the few query tokens of a decode step, the cache split over programs.

    softmax(scale * q k^T) v,   at most 16 tokens over the batch, query t of row b seeing slots starts[b] .. lengths[b] + t

The heads that share a kv head are the rows of one product, so a slot is read once for up to BLOCK_M of them (more heads or tokens
take more blocks, which run side by side). A tile of slots is the tall side of both products and the few rows the narrow one, since
the softmax is paid for each padded row: scores are k q^T, the sums v^T p.

Up to `splits` programs take a sequence's tiles in turn, as many as the lengths in device memory ask for, a tile or more each: a
captured graph replays while the cache grows. The others leave at once; a program that is alone finishes alone; else each leaves
its sums in the workspace and the last by ticket joins them in the order of the programs.

Reads k and v once, [batch, kv_heads, length, head_dim] each; partial sums are (head_dim + 2) floats a head and program.
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
from granite_kernels.kernels.attention import SIZES, cache_offset, check
from granite_kernels.kernels.softmax import attend_tiles, join
from granite_kernels.launch import DECODE_TOKENS, INTERPRETED, Target, attention_decode_launch, target
from granite_kernels.operation import operation
from granite_kernels.workspace import Workspace


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Of q and out alone: how much the cache holds is known to the device alone."""
    rows = grid[2] * args["tokens"] * args["GROUP"]
    return {"name": kernel.name, "flops": 0, "bytes": 2 * rows * args["HEAD_DIM"] * args["q_ptr"].element_size()}


@triton.jit(do_not_specialize=[*SIZES, "shift"], launch_metadata=_cost)
def _attention_decode_kernel(
    q_ptr,  # [batch, tokens, KV_HEADS * GROUP, HEAD_DIM]
    k_cache_ptr,  # [batch, KV_HEADS, context, HEAD_DIM]
    v_cache_ptr,  # as k_cache
    lengths_ptr,  # int32 [batch]
    starts_ptr,  # int32 [batch]
    out_ptr,  # [batch, tokens, KV_HEADS * GROUP, HEAD_DIM], contiguous
    tickets_ptr,  # int32 [batch, KV_HEADS, blocks]
    sums_ptr,  # [batch, KV_HEADS, splits, tokens * GROUP, HEAD_DIM]
    weights_ptr,  # [batch, KV_HEADS, splits, tokens * GROUP, 2]
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    cache_stride_batch,
    cache_stride_head,
    tokens,
    factor,  # scale * log2(e)
    shift,  # a program takes 1 << shift tiles or more, where more than one does
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    split, splits = tl.program_id(0), tl.num_programs(0)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    pair = tl.program_id(2)  # at 16 tokens all but the caches is small enough for 32 bits; the wrapper checks q
    batch, kv_head = pair // KV_HEADS, pair % KV_HEADS
    start = tl.load(starts_ptr + batch)
    before = tl.load(lengths_ptr + batch) - start  # slots that count, ahead of token 0; negative where token 0 is padding
    end = before + tokens
    share = (BLOCK_N << shift) - 1
    active = tl.maximum(tl.minimum((end + share) // BLOCK_N >> shift, splits), 1)  # one writes the zeros where nothing is seen
    if split >= active:
        return

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    real = token < tokens
    d = tl.arange(0, HEAD_DIM)
    from_q = tl.multiple_of(batch * q_stride_batch + token * q_stride_token + head * q_stride_head, 16)
    q = tl.load(q_ptr + (from_q[:, None] + d[None, :]), mask=real[:, None], other=0.0)

    cache = cache_offset(batch, kv_head, start, cache_stride_batch, cache_stride_head, HEAD_DIM)
    k_ptr, v_ptr = k_cache_ptr + cache, v_cache_ptr + cache
    acc, peak, total = attend_tiles(
        tl.trans(q), k_ptr, v_ptr, before + token, split * BLOCK_N, end, active * BLOCK_N, factor, HEAD_DIM, BLOCK_M, BLOCK_N
    )

    if active == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[None, :]  # a row that sees nothing yields zeros
        to = ((batch * tokens + token) * (KV_HEADS * GROUP) + head) * HEAD_DIM
        tl.store(out_ptr + (to[None, :] + d[:, None]), acc.to(out_ptr.dtype.element_ty), mask=real[None, :])
        return

    rows = tokens * GROUP
    own = (pair * splits + split) * rows + row
    tl.store(sums_ptr + (own[None, :] * HEAD_DIM + d[:, None]), acc, mask=real[None, :])
    tl.store(weights_ptr + own * 2, peak, mask=real)
    tl.store(weights_ptr + own * 2 + 1, total, mask=real)
    tl.debug_barrier()  # every thread's stores come before the ticket
    ticket = tickets_ptr + pair * blocks + block
    if tl.atomic_add(ticket, 1, sem="acq_rel") == active - 1:
        tl.atomic_xchg(ticket, 0, sem="relaxed")  # so that the next launch, or a replayed graph, starts at zero
        first, room = block * BLOCK_M, pair * splits * rows
        joined = join(sums_ptr + room * HEAD_DIM, weights_ptr + room * 2, active, first, rows, HEAD_DIM, BLOCK_R, CHUNK)
        few = first + tl.arange(0, BLOCK_R)
        to = ((batch * tokens + few // GROUP) * (KV_HEADS * GROUP) + kv_head * GROUP + few % GROUP) * HEAD_DIM
        tl.store(out_ptr + (to[:, None] + d[None, :]), joined.to(out_ptr.dtype.element_ty), mask=(few < rows)[:, None])


# ------------------------------------------------------------------ launch


def workspace_size(batch: int, kv_heads: int, group: int, head_dim: int, tokens: int, where: Target = INTERPRETED) -> tuple[int, int]:
    """(tickets, partials) that a call with these sizes may need on `where`, for every cache dtype and length."""
    rows = tokens * group
    splits = attention_decode_launch(batch * tokens, rows, kv_heads, head_dim, torch.bfloat16, where).splits
    return batch * kv_heads * triton.cdiv(rows, 8), batch * kv_heads * splits * rows * (head_dim + 2)


@operation("granite_kernels::attention_decode", mutates_args=("tickets", "partials"))
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
    shape = attention_decode_launch(batch * tokens, rows, kv_heads, head_dim, q.dtype, where)
    blocks = triton.cdiv(rows, shape.block_m)
    splits = min(shape.splits, triton.cdiv(k_cache.shape[2], shape.block_n << shape.shift))  # the rest could never have work
    block_r = min(triton.next_power_of_2(group), shape.block_m) if tokens == 1 else shape.block_m  # three kernels serve all tokens
    sums = batch * kv_heads * splits * rows * head_dim
    pdl = q.is_cuda and where.arch >= 90
    _attention_decode_kernel[(splits, blocks, batch * kv_heads)](
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
        shape.shift,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        GROUP=group,
        BLOCK_R=block_r,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        CHUNK=max(4096 // (block_r * head_dim), 1),
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

    Deterministic. A row's bits depend on its own slots, its tokens, whether the call has more than 8 tokens and the GPU model, never
    on what the rest of the batch holds, on padding or on the context that the cache has room for. workspace: at least
    `workspace_size(...)`; None allocates one.
    """
    check(q, k_cache, v_cache, lengths, starts, scale)
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    if (batch - 1) * q.stride(0) >= 1 << 31:
        raise GraniteError(f"rows of q lie {q.stride(0)} values apart: {batch} of them must lie within 2^31")
    if batch * tokens > DECODE_TOKENS:
        raise GraniteError(f"{batch} rows of {tokens} tokens: attention_decode takes {DECODE_TOKENS} together, use attention")
    need = workspace_size(batch, kv_heads, heads // kv_heads, head_dim, tokens, target(q))
    if workspace is None:
        workspace = Workspace.allocate(*need, q.device)
    workspace.need(*need)
    return _attention_decode(q, k_cache, v_cache, lengths, starts, workspace.tickets, workspace.partials, scale)
