"""Causal grouped-query flash attention over the cache: softmax(scale * q k^T) v, for prefill and chunks of it.

Query t of row b stands at slot lengths[b] + t and sees slots starts[b] .. lengths[b] + t. A program owns BLOCK_M rows of one kv
head, a row being one query head of one token, tokens outermost: a tile of k and v is read once for the whole group. Tiles are
counted from the row's start, so a row padded on the left gives the bits of the same row without padding, and a batch those of its
rows alone.

Scores and softmax are float32; p is rounded to the cache's dtype for the second product, and the output is rounded once.
Reads q once, and k and v once a block of rows, up to the diagonal; writes out once.
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
from granite_kernels.kernels.softmax import attend
from granite_kernels.launch import attention_launch, target
from granite_kernels.operation import operation

SIZES = ["q_stride_batch", "q_stride_token", "q_stride_head", "cache_stride_batch", "cache_stride_head", "tokens"]  # of a request


@triton.jit
def cache_offset(batch, kv_head, start, cache_stride_batch, cache_stride_head, HEAD_DIM: tl.constexpr):
    """Elements before slot `start` of a sequence's kv head, in 64 bits: within a head 32 are enough.

    The strides are multiples of 16, which makes for wide loads and which a launch that does not specialize can't say itself.
    """
    return (
        tl.multiple_of(cache_stride_batch.to(tl.int64), 16) * batch
        + tl.multiple_of(cache_stride_head.to(tl.int64), 16) * kv_head
        + start.to(tl.int64) * HEAD_DIM
    )


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Of this call's own tokens: what the cache held before is known to the device alone."""
    _, kv_heads, batch = grid
    tokens, heads = args["tokens"], kv_heads * args["GROUP"]
    flops = 2 * batch * heads * args["HEAD_DIM"] * tokens * (tokens + 1)
    size = args["q_ptr"].element_size() * args["HEAD_DIM"]
    return {"name": kernel.name, "flops": flops, "bytes": 2 * batch * tokens * (heads + kv_heads) * size}


@triton.jit(do_not_specialize=SIZES, launch_metadata=_cost)
def _attention_kernel(
    q_ptr,  # [batch, tokens, heads, HEAD_DIM]
    k_cache_ptr,  # [batch, kv_heads, context, HEAD_DIM]
    v_cache_ptr,  # as k_cache
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
        gdc_launch_dependents()
        gdc_wait()
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see the most slots: they go first
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.load(starts_ptr + batch)
    before = tl.load(lengths_ptr + batch) - start  # slots that count, ahead of token 0; negative where token 0 is padding

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    real = (token < tokens)[:, None]
    d = tl.arange(0, HEAD_DIM)[None, :]
    from_q = tl.multiple_of(q_stride_batch.to(tl.int64), 16) * batch + tl.multiple_of(q_stride_token.to(tl.int64), 16) * token
    from_q += tl.multiple_of(q_stride_head.to(tl.int64), 16) * head
    q = tl.load(q_ptr + from_q[:, None] + d, mask=real, other=0.0)

    first, last = block * BLOCK_M // GROUP, tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    whole, end = tl.maximum(before + first + 1, 0) // BLOCK_N * BLOCK_N, before + last + 1  # seen by all rows, by any
    cache = cache_offset(batch, kv_head, start, cache_stride_batch, cache_stride_head, HEAD_DIM)
    k_ptr, v_ptr = k_cache_ptr + cache, v_cache_ptr + cache
    column = tl.arange(0, BLOCK_N)
    tile = column[:, None] * HEAD_DIM + d
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    peak = tl.full((BLOCK_M,), -3.0e38, tl.float32)  # finite, so that a row that sees nothing meets no inf - inf
    total = tl.zeros((BLOCK_M,), tl.float32)
    for slot in range(0, whole, BLOCK_N):
        k = tl.load(k_ptr + slot * HEAD_DIM + tile)
        v = tl.load(v_ptr + slot * HEAD_DIM + tile)
        acc, peak, total = attend(q, k, v, None, acc, peak, total, factor)
    for slot in range(whole, end, BLOCK_N):
        # slots behind the last may hold NaN, which a probability of zero would not undo: the last is read in their place
        tile = tl.minimum(column, end - 1 - slot)[:, None] * HEAD_DIM + d
        k = tl.load(k_ptr + slot * HEAD_DIM + tile)
        v = tl.load(v_ptr + slot * HEAD_DIM + tile)
        seen = column[None, :] <= (before + token - slot)[:, None]
        acc, peak, total = attend(q, k, v, seen, acc, peak, total, factor)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # a row that sees nothing yields zeros

    to = (batch * tokens + token) * (tl.num_programs(1) * GROUP) + head
    tl.store(out_ptr + to[:, None] * HEAD_DIM + d, acc.to(out_ptr.dtype.element_ty), mask=real)


# ------------------------------------------------------------------ launch


def check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor, scale: float) -> None:
    """Raise GraniteError where shapes, dtypes, strides or the scale are not those that the kernels take."""
    batch, _, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    if k_cache.shape != v_cache.shape or k_cache.shape[0] != batch or k_cache.shape[3] != head_dim or heads % kv_heads:
        raise GraniteError(f"q {tuple(q.shape)} does not go with k {tuple(k_cache.shape)} and v {tuple(v_cache.shape)}")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not q.dtype == k_cache.dtype == v_cache.dtype:
        raise GraniteError(
            f"q, k and v are {q.dtype}, {k_cache.dtype}, {v_cache.dtype}: expected one of float32, bfloat16, float16 for all"
        )
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise GraniteError(f"head size {head_dim}: kernels take powers of two from 16 on")
    if k_cache.stride() != v_cache.stride() or k_cache.stride()[2:] != (head_dim, 1):
        raise GraniteError("k and v need the same strides, their slots being contiguous rows of head_dim")
    if q.stride(3) != 1 or any(stride % 16 for stride in (*q.stride()[:3], *k_cache.stride()[:2])):
        raise GraniteError("heads of q and of the cache must be contiguous, at strides that are multiples of 16")
    if lengths.dtype != torch.int32 or starts.dtype != torch.int32 or not lengths.shape == starts.shape == (batch,):
        raise GraniteError(f"lengths and starts must be int32 [{batch}]")
    if not scale > 0:
        raise GraniteError(f"scale {scale}: expected a positive number")


@operation("granite_kernels::attention", mutates_args=())
def _attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor, scale: float) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    rows = tokens * (heads // kv_heads)
    where = target(q)
    shape = attention_launch(head_dim, q.dtype, where)
    pdl = q.is_cuda and where.arch >= 90
    _attention_kernel[(triton.cdiv(rows, shape.block_m), kv_heads, batch)](
        q,
        k_cache,
        v_cache,
        lengths,
        starts,
        out,
        *q.stride()[:3],
        *k_cache.stride()[:2],
        tokens,
        scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        GROUP=heads // kv_heads,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        PDL=pdl,
        num_warps=shape.warps,
        num_stages=shape.stages,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


@_attention.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor, *, scale: float) -> Tensor:
    """softmax(scale * q k^T) v over the cache, causal. Returns [batch, tokens, heads, head_dim], in the dtype of q.

    q [batch, tokens, heads, head_dim]; k_cache, v_cache [batch, kv_heads, context, head_dim], this call's keys included; lengths
    int32 [batch], slots in use before this call; starts int32 [batch], first slot of each row that is not padding. Slots that no
    query sees are not read. A row's bits do not depend on the rest of the batch nor on its padding. Raises GraniteError.
    """
    check(q, k_cache, v_cache, lengths, starts, scale)
    return _attention(q, k_cache, v_cache, lengths, starts, scale)
