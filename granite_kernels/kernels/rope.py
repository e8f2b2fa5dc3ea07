"""Rotary position embedding in the rotate-half form, and the write of k and v into the cache, in one launch.

    (a, b) -> (a cos - b sin, b cos + a sin),  a and b the halves of a head

A program has one token: its q, k and v heads are read once (they may be views of one fused product) and written once, q to its
own tensor, k and v to slot lengths[row] + token of the cache. cos | sin are one row of a table. In float32, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.launch import DTYPES
from granite_kernels.operation import operation

STRIDES = [f"{name}_stride_{dim}" for name in "qkv" for dim in ("batch", "token", "head")]
STRIDES += ["cache_stride_batch", "cache_stride_head"]


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    heads = args["HEADS"] + 2 * args["KV_HEADS"]
    values = grid[0] * heads * args["HEAD_DIM"]
    return {"name": kernel.name, "flops": 3 * values, "bytes": 2 * values * args["q_ptr"].element_size()}


@triton.jit
def _rotated(x_ptr, at, cos, sin, mask, HEAD_DIM: tl.constexpr):
    a = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HEAD_DIM // 2 + at, mask=mask, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _wide(stride, ALIGNED: tl.constexpr):
    """The stride in 64 bits, and that it is a multiple of 16, which an argument that isn't specialised can't say itself."""
    return tl.multiple_of(stride.to(tl.int64), 16) if ALIGNED else stride.to(tl.int64)


@triton.jit(do_not_specialize=[*STRIDES, "tokens"], launch_metadata=_cost)
def _rope_append_kernel(
    q_ptr,  # [batch, tokens, heads, head_dim]
    k_ptr,  # [batch, tokens, kv_heads, head_dim]
    v_ptr,  # as k
    rotary_ptr,  # [positions, head_dim]: cos | sin
    positions_ptr,  # int32 [batch, tokens]
    lengths_ptr,  # int32 [batch]
    out_ptr,  # [batch, tokens, heads, head_dim], contiguous
    k_cache_ptr,  # [batch, kv_heads, context, head_dim]
    v_cache_ptr,  # as k_cache
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    v_stride_batch,
    v_stride_token,
    v_stride_head,
    cache_stride_batch,
    cache_stride_head,
    tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0)
    sequence, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)  # a 64-bit division is some hundred instructions
    row = row.to(tl.int64)
    slot = tl.load(lengths_ptr + sequence).to(tl.int64) + token
    at = tl.arange(0, HALF_BLOCK)[None, :]
    within = at < HEAD_DIM // 2
    turn = rotary_ptr + tl.load(positions_ptr + row).to(tl.int64) * HEAD_DIM + at
    cos = tl.load(turn, mask=within, other=1.0).to(tl.float32)
    sin = tl.load(turn + HEAD_DIM // 2, mask=within, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty

    head = tl.arange(0, HEAD_BLOCK)[:, None]
    mask = (head < HEADS) & within
    q_ptr += sequence * _wide(q_stride_batch, ALIGNED) + token * _wide(q_stride_token, ALIGNED)
    first, second = _rotated(q_ptr, head * _wide(q_stride_head, ALIGNED) + at, cos, sin, mask, HEAD_DIM)
    out = out_ptr + row * HEADS * HEAD_DIM + head * HEAD_DIM + at
    tl.store(out, first.to(dtype), mask=mask)
    tl.store(out + HEAD_DIM // 2, second.to(dtype), mask=mask)

    head = tl.arange(0, KV_BLOCK)[:, None]
    mask = (head < KV_HEADS) & within
    to = sequence * _wide(cache_stride_batch, ALIGNED) + slot * HEAD_DIM + head * _wide(cache_stride_head, ALIGNED) + at
    k_ptr += sequence * _wide(k_stride_batch, ALIGNED) + token * _wide(k_stride_token, ALIGNED)
    first, second = _rotated(k_ptr, head * _wide(k_stride_head, ALIGNED) + at, cos, sin, mask, HEAD_DIM)
    tl.store(k_cache_ptr + to, first.to(dtype), mask=mask)
    tl.store(k_cache_ptr + to + HEAD_DIM // 2, second.to(dtype), mask=mask)

    v_ptr += sequence * _wide(v_stride_batch, ALIGNED) + token * _wide(v_stride_token, ALIGNED)
    v = v_ptr + head * _wide(v_stride_head, ALIGNED) + at
    tl.store(v_cache_ptr + to, tl.load(v, mask=mask, other=0.0), mask=mask)
    tl.store(v_cache_ptr + to + HEAD_DIM // 2, tl.load(v + HEAD_DIM // 2, mask=mask, other=0.0), mask=mask)


@operation("granite_kernels::rope_append", mutates_args=("k_cache", "v_cache"))
def _rope_append(
    q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, positions: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:2])
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
        *strides,
        tokens,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=triton.next_power_of_2(heads),
        KV_BLOCK=triton.next_power_of_2(kv_heads),
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        ALIGNED=all(stride % 16 == 0 for stride in strides),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


@_rope_append.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, positions: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _check(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, positions: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    batch, tokens, _, head_dim = q.shape
    if k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (batch, tokens, head_dim) or head_dim % 2:
        raise GraniteError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} don't go together, or have heads of odd size")
    if k_cache.shape != v_cache.shape or (*k_cache.shape[:2], k_cache.shape[3]) != (batch, k.shape[2], head_dim):
        raise GraniteError(f"k {tuple(k.shape)} doesn't go into caches of shape {tuple(k_cache.shape)} and {tuple(v_cache.shape)}")
    if k_cache.stride() != v_cache.stride() or k_cache.stride()[2:] != (head_dim, 1):
        raise GraniteError("the caches need the same strides, their slots being contiguous rows of head_dim")
    if rotary.shape[1:] != (head_dim,) or positions.shape != (batch, tokens) or lengths.shape != (batch,):
        shapes = f"{tuple(rotary.shape)}, {tuple(positions.shape)} and {tuple(lengths.shape)}"
        raise GraniteError(f"rotary, positions and lengths are {shapes}: expected [.., {head_dim}], [{batch}, {tokens}] and [{batch}]")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype == rotary.dtype == k_cache.dtype == v_cache.dtype:
        raise GraniteError(f"q is {q.dtype}: expected one of float32, bfloat16, float16 for q, k, v, rotary and the caches alike")
    if any(t.stride(-1) != 1 for t in (q, k, v)) or not (rotary.is_contiguous() and positions.is_contiguous()):
        raise GraniteError("heads, the rotary table and the positions must be contiguous")


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, positions: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Rotate q and k, store k and v behind what the cache holds, return the rotated q.

    q [batch, tokens, heads, head_dim]; k, v [batch, tokens, kv_heads, head_dim], strided as they like but for the last dimension;
    rotary [positions, head_dim] (cos | sin); positions int32 [batch, tokens]; lengths int32 [batch], slots in use before this
    call; k_cache, v_cache [batch, kv_heads, context, head_dim], written at slots lengths .. lengths + tokens - 1, which must
    exist, as must the positions: they are known to the device alone. Raises GraniteError.
    """
    _check(q, k, v, rotary, positions, lengths, k_cache, v_cache)
    out: Tensor = _rope_append(q, k, v, rotary, positions, lengths, k_cache, v_cache)
    return out
