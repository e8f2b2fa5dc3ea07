"""Causal grouped-query flash attention over the cache: softmax(scale * q k^T) v, for prefill and chunks of it.

Query t of row b stands at slot lengths[b] + t and sees slots starts[b] .. lengths[b] + t. A program owns BLOCK_M rows of one kv
head, a row being one query head of one token, tokens outermost: a tile of k and v is read once for the whole group. Tiles are
counted from the row's start, so that a row padded on the left gives the bits of the same row without padding, a prompt read in
chunks those of the whole one (given the same block sizes), and a batch those of its rows alone.

Scores and softmax are float32; p is rounded to the cache's type for the second product, and the output is rounded once.
Reads q once and k, v once per block of rows (up to the diagonal); writes out once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels import launch
from granite_kernels.kernels.softmax import attend, load_rows

UNSPECIALIZED = ["q_stride_batch", "q_stride_token", "q_stride_head", "cache_stride_batch", "cache_stride_head", "tokens"]


def _cost(grid: tuple[int, ...], kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Of the tokens of this call alone: what the cache already holds is known only to the device."""
    heads = grid[1] * args["GROUP"]
    size = args["q_ptr"].element_size()
    pairs = grid[2] * heads * args["tokens"] * (args["tokens"] + 1) // 2
    rows = grid[2] * args["tokens"] * (2 * heads + 2 * grid[1])
    return {"name": kernel.name, "flops": 4 * args["HEAD_DIM"] * pairs, "bytes": rows * args["HEAD_DIM"] * size}


@triton.jit(do_not_specialize=UNSPECIALIZED, launch_metadata=_cost)
def _attention_kernel(
    q_ptr,  # [batch, tokens, heads, HEAD_DIM]
    k_cache_ptr,  # [batch, kv_heads, context, HEAD_DIM]
    v_cache_ptr,  # [batch, kv_heads, context, HEAD_DIM]
    lengths_ptr,  # int32 [batch]
    starts_ptr,  # int32 [batch]
    out_ptr,  # [batch, tokens, heads, HEAD_DIM], contiguous
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    cache_stride_batch,
    cache_stride_head,
    tokens,
    factor,  # scale * log2(e)
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see the most slots: start them first
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.load(starts_ptr + batch)
    before = tl.load(lengths_ptr + batch) - start  # visible slots ahead of token 0; negative while the row is padding

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    valid = row < tokens * GROUP
    q = load_rows(q_ptr, batch, token, head, valid, q_stride_batch, q_stride_token, q_stride_head, HEAD_DIM)

    first_token = block * BLOCK_M // GROUP
    last_token = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    seen_by_all = tl.maximum(before + first_token + 1, 0) // BLOCK_N * BLOCK_N
    seen_by_any = before + last_token + 1
    limit = before + token  # the last slot that a row sees, counted from start

    cache = tl.multiple_of(cache_stride_batch.to(tl.int64), 16) * batch + tl.multiple_of(cache_stride_head.to(tl.int64), 16) * kv_head
    cache += start.to(tl.int64) * HEAD_DIM
    column = tl.arange(0, BLOCK_N)
    tile = column[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    peak = tl.full((BLOCK_M,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for slot in range(0, seen_by_all, BLOCK_N):
        k = tl.load(k_cache_ptr + cache + slot * HEAD_DIM + tile)
        v = tl.load(v_cache_ptr + cache + slot * HEAD_DIM + tile)
        acc, peak, total = attend(q, k, v, None, acc, peak, total, factor)
    for slot in range(seen_by_all, seen_by_any, BLOCK_N):
        used = (slot + column < seen_by_any)[:, None]  # what lies behind may be NaN, which 0 * v would keep
        k = tl.load(k_cache_ptr + cache + slot * HEAD_DIM + tile, mask=used, other=0.0)
        v = tl.load(v_cache_ptr + cache + slot * HEAD_DIM + tile, mask=used, other=0.0)
        acc, peak, total = attend(q, k, v, (slot + column)[None, :] <= limit[:, None], acc, peak, total, factor)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # a row that sees nothing yields zeros

    heads = tl.num_programs(1) * GROUP
    to = out_ptr + ((batch * tokens + token) * heads + head)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None])


@torch.library.custom_op("granite_kernels::attention", mutates_args=())
def _attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor, scale: float) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    rows = tokens * heads // kv_heads
    device = launch.target(q)
    shape = launch.attention_shape(rows, head_dim, q.dtype, device)
    pdl = launch.pdl(q)
    _attention_kernel[(triton.cdiv(rows, shape.block_m), kv_heads, batch)](
        q,
        k_cache,
        v_cache,
        lengths,
        starts,
        out,
        q_stride_batch=q.stride(0),
        q_stride_token=q.stride(1),
        q_stride_head=q.stride(2),
        cache_stride_batch=k_cache.stride(0),
        cache_stride_head=k_cache.stride(1),
        tokens=tokens,
        factor=scale * LOG2_E,
        HEAD_DIM=head_dim,
        GROUP=heads // kv_heads,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        PDL=pdl,
        num_warps=shape.warps,
        num_stages=shape.stages,
        enable_fp_fusion=True,
        launch_pdl=pdl,
    )
    return out
