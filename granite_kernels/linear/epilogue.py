"""What happens to the finished sums: y float32 [16 * GROUPS rows, TOKENS], in the program that holds them, rounded once.

Rows are ordered [group, first | second of a pair, 8] (see body.py), so that the two halves of a rotation, or gate and up, lie in
the same thread. Columns past `tokens` and rows past `rows` hold repetitions, which only these stores leave out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pairs(y, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """[16 GROUPS, TOKENS] -> the first rows of the pairs [8 GROUPS, TOKENS], and the second."""
    split = tl.permute(tl.reshape(y, (GROUPS, 2, 8, TOKENS)), (0, 2, 3, 1))
    first, second = tl.split(split)
    return tl.reshape(first, (8 * GROUPS, TOKENS)), tl.reshape(second, (8 * GROUPS, TOKENS))


@triton.jit
def _places(first, end, tokens, rows, COUNT: tl.constexpr, TOKENS: tl.constexpr):
    """Offsets into [tokens, rows] of COUNT rows from `first`, int64 [COUNT, TOKENS], and which of them exist: those below `end`."""
    row = first + tl.arange(0, COUNT)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    return token.to(tl.int64) * rows + row, (token < tokens) & (row < end)


@triton.jit
def store_divided(y, first, end, out_ptr, tokens, rows, scaling, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """out [tokens, rows] = y / scaling. An odd number of rows leaves out's rows unaligned: the stores are single values."""
    at, inside = _places(first, end, tokens, rows, 16 * GROUPS, TOKENS)
    tl.store(out_ptr + at, (y / scaling).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_added(y, first, end, residual_ptr, out_ptr, tokens, rows, scale, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """out [tokens, rows] = residual + y * scale."""
    at, inside = _places(first, end, tokens, rows, 16 * GROUPS, TOKENS)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (residual + y * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_swiglu(y, block, out_ptr, tokens, inner, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """out [tokens, inner] = silu(gate) * up."""
    gate, up = pairs(y, GROUPS, TOKENS)
    at, inside = _places(block * (8 * GROUPS), inner, tokens, inner, 8 * GROUPS, TOKENS)
    tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_rotated(
    y,
    row,  # int64 [8 * GROUPS]: first rows of the pairs
    end,  # the row behind the last
    rotary_ptr,  # [positions, head_dim]: cos | sin
    positions_ptr,  # [tokens]
    lengths_ptr,  # [batch]
    q_ptr,  # [tokens, heads, head_dim]
    k_cache_ptr,  # [batch, kv_heads, context, head_dim]
    v_cache_ptr,  # as k_cache
    k_cache_stride_batch,
    k_cache_stride_head,
    v_cache_stride_batch,
    v_cache_stride_head,
    tokens,
    tokens_a_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Rotate the rows of q and k; q goes to its tensor, k and v to slot lengths[sequence] + token of the cache."""
    HALF: tl.constexpr = HEAD_DIM // 2
    a, b = pairs(y, GROUPS, TOKENS)
    head, at = (row // HEAD_DIM)[:, None], (row % HEAD_DIM)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    real = (token < tokens) & (row < end)[:, None]
    sequence = (token // tokens_a_row).to(tl.int64)
    slot = tl.load(lengths_ptr + sequence, mask=token < tokens, other=0).to(tl.int64) + token % tokens_a_row
    turn = rotary_ptr + tl.load(positions_ptr + token, mask=token < tokens, other=0).to(tl.int64) * HEAD_DIM + at
    turned = real & (head < HEADS + KV_HEADS)
    cos = tl.load(turn, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(turn + HALF, mask=turned, other=0.0).to(tl.float32)
    first = tl.where(turned, a * cos - b * sin, a).to(q_ptr.dtype.element_ty)
    second = tl.where(turned, b * cos + a * sin, b).to(q_ptr.dtype.element_ty)
    # every row has one destination, whose stores follow
    is_q = real & (head < HEADS)
    q = q_ptr + (token.to(tl.int64) * HEADS + head) * HEAD_DIM + at
    tl.store(q, first, mask=is_q)
    tl.store(q + HALF, second, mask=is_q)
    is_k = turned & (head >= HEADS)
    k = k_cache_ptr + sequence * k_cache_stride_batch + (head - HEADS) * k_cache_stride_head + slot * HEAD_DIM + at
    tl.store(k, first, mask=is_k)
    tl.store(k + HALF, second, mask=is_k)
    kv = head - HEADS - KV_HEADS
    is_v = real & (kv >= 0)
    v = v_cache_ptr + sequence * v_cache_stride_batch + kv * v_cache_stride_head + slot * HEAD_DIM + at
    tl.store(v, first, mask=is_v)
    tl.store(v + HALF, second, mask=is_v)
