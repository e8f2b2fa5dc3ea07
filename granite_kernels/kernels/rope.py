"""Rotary position embedding in the rotate-half form, and the write of k and v into the cache, in one launch.

    (a, b) -> (a cos - b sin, b cos + a sin),  a and b the halves of a head

A program has one token: its q, k and v heads are read once (they may be views of one fused product) and written once, q to its
own tensor, k and v to slot lengths[row] + token of the cache. cos | sin are one row of a table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    heads = args["HEADS"] + 2 * args["KV_HEADS"]
    values = grid[0] * heads * args["HEAD_DIM"]
    return {"name": kernel.name, "flops": 3 * values, "bytes": 2 * values * args["q_ptr"].element_size()}


@triton.jit
def _rotated(x_ptr, head, at, cos, sin, mask, HEAD_DIM: tl.constexpr):
    a = tl.load(x_ptr + head * HEAD_DIM + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + head * HEAD_DIM + HEAD_DIM // 2 + at, mask=mask, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit(
    do_not_specialize=["tokens", "k_cache_stride_batch", "k_cache_stride_head", "v_cache_stride_batch", "v_cache_stride_head"],
    launch_metadata=_cost,
)
def _rope_append_kernel(
    q_ptr,  # [batch, tokens, heads, head_dim]; heads of a token contiguous
    k_ptr,  # [batch, tokens, kv_heads, head_dim]; likewise
    v_ptr,  # as k
    rotary_ptr,  # [positions, head_dim]: cos | sin
    positions_ptr,  # int32 [batch, tokens]
    lengths_ptr,  # int32 [batch]
    out_ptr,  # [batch, tokens, heads, head_dim]
    k_cache_ptr,  # [batch, kv_heads, context, head_dim]
    v_cache_ptr,  # as k_cache
    q_stride_token,
    k_stride_token,
    v_stride_token,
    k_cache_stride_batch,
    k_cache_stride_head,
    v_cache_stride_batch,
    v_cache_stride_head,
    tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    sequence = token // tokens
    slot = tl.load(lengths_ptr + sequence).to(tl.int64) + token % tokens
    at = tl.arange(0, HALF_BLOCK)[None, :]
    within = at < HEAD_DIM // 2
    turn = rotary_ptr + tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM + at
    cos = tl.load(turn, mask=within, other=1.0).to(tl.float32)
    sin = tl.load(turn + HEAD_DIM // 2, mask=within, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty

    head = tl.arange(0, HEAD_BLOCK)[:, None]
    mask = (head < HEADS) & within
    first, second = _rotated(q_ptr + token * q_stride_token, head, at, cos, sin, mask, HEAD_DIM)
    out = out_ptr + token * HEADS * HEAD_DIM + head * HEAD_DIM + at
    tl.store(out, first.to(dtype), mask=mask)
    tl.store(out + HEAD_DIM // 2, second.to(dtype), mask=mask)

    head = tl.arange(0, KV_BLOCK)[:, None]
    mask = (head < KV_HEADS) & within
    first, second = _rotated(k_ptr + token * k_stride_token, head, at, cos, sin, mask, HEAD_DIM)
    k_cache = k_cache_ptr + sequence * k_cache_stride_batch + head.to(tl.int64) * k_cache_stride_head + slot * HEAD_DIM + at
    tl.store(k_cache, first.to(dtype), mask=mask)
    tl.store(k_cache + HEAD_DIM // 2, second.to(dtype), mask=mask)

    v = v_ptr + token * v_stride_token + head * HEAD_DIM + at
    v_cache = v_cache_ptr + sequence * v_cache_stride_batch + head.to(tl.int64) * v_cache_stride_head + slot * HEAD_DIM + at
    tl.store(v_cache, tl.load(v, mask=mask, other=0.0), mask=mask)
    tl.store(v_cache + HEAD_DIM // 2, tl.load(v + HEAD_DIM // 2, mask=mask, other=0.0), mask=mask)


@torch.library.custom_op("granite_kernels::rope_append", mutates_args=("k_cache", "v_cache"))
def _rope_append(
    q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, positions: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    out = q.new_empty(q.shape)
    _rope_append_kernel[(batch * tokens,)](
        q,
        k,
        v,
        rotary,
        positions,
        lengths,
        out,
        k_cache,
        v_cache,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        *k_cache.stride()[:2],
        *v_cache.stride()[:2],
        tokens,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=triton.next_power_of_2(heads),
        KV_BLOCK=triton.next_power_of_2(kv_heads),
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


@_rope_append.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, positions: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _heads_together(x: Tensor) -> Tensor:
    """x [batch, tokens, heads, head_dim] with a token's heads contiguous and one stride from token to token: itself, if it is so."""
    batch, tokens, _, head_dim = x.shape
    fits = x.stride()[2:] == (head_dim, 1) and (batch == 1 or x.stride(0) == tokens * x.stride(1))
    return x if fits else x.contiguous()


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, positions: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Rotate q and k, store k and v behind what the cache holds, return the rotated q.

    q [batch, tokens, heads, head_dim]; k, v [batch, tokens, kv_heads, head_dim]; rotary [positions, head_dim] (cos | sin);
    positions int32 [batch, tokens]; lengths int32 [batch], slots in use before this call; k_cache, v_cache
    [batch, kv_heads, context, head_dim], written at slots lengths .. lengths + tokens - 1.
    """
    head_dim = q.shape[-1]
    if k_cache.stride()[2:] != (head_dim, 1) or v_cache.stride()[2:] != (head_dim, 1):
        raise ValueError("the slots of a cache must be contiguous rows of head_dim")
    q, k, v = _heads_together(q), _heads_together(k), _heads_together(v)
    out: Tensor = _rope_append(q, k, v, rotary, positions.contiguous(), lengths, k_cache, v_cache)
    return out
