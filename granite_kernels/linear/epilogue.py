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
    row,  # int32 [8 * GROUPS]: first rows of the pairs
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
    sequence = ((token + 0.5) * (1.0 / tokens_a_row)).to(tl.int32)  # token // tokens_a_row, which has no instruction of its own
    slot = tl.load(lengths_ptr + sequence, mask=token < tokens, other=0) + (token - sequence * tokens_a_row)
    turn = rotary_ptr + tl.load(positions_ptr + token, mask=token < tokens, other=0).to(tl.int64) * HEAD_DIM + at
    turned = real & (head < HEADS + KV_HEADS)
    cos = tl.load(turn, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(turn + HALF, mask=turned, other=0.0).to(tl.float32)
    first = tl.where(turned, a * cos - b * sin, a).to(q_ptr.dtype.element_ty)
    second = tl.where(turned, b * cos + a * sin, b).to(q_ptr.dtype.element_ty)
    # every row has one destination
    is_v = head >= HEADS + KV_HEADS
    cache = tl.where(is_v, v_cache_ptr, k_cache_ptr)
    cache += (head - tl.where(is_v, HEADS + KV_HEADS, HEADS)).to(tl.int64) * tl.where(is_v, v_cache_stride_head, k_cache_stride_head)
    cache += sequence.to(tl.int64) * tl.where(is_v, v_cache_stride_batch, k_cache_stride_batch)
    q = q_ptr + (token.to(tl.int64) * HEADS + head) * HEAD_DIM
    place = tl.where(head < HEADS, q, cache + slot.to(tl.int64) * HEAD_DIM) + at
    tl.store(place, first, mask=real)
    tl.store(place + HALF, second, mask=real)
