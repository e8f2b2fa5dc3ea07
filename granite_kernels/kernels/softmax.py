"""The online softmax of attention: one tile, a program's tiles, and the sums of several programs.

    peak' = max(peak, scores),   acc' = acc 2^(peak - peak') + 2^(scores - peak') v,   total likewise without v

A score counts as a base-2 logarithm: `factor`, the scale times log2(e), which is positive, joins where the peak is taken off, one
fused multiply-add a score.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(q, k, v, seen, acc, peak, total, factor):
    """One tile of the online softmax: q [rows, head_dim], k and v [slots, head_dim], seen [rows, slots] or None for all.

    acc [rows, head_dim] and total [rows] are sums over 2^(factor * score - peak), factor being positive.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * factor)
    p = tl.exp2(scores * factor - higher[:, None])  # one fused multiply-add a score
    fade = tl.exp2(peak - higher)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, higher, total * fade + tl.sum(p, 1)


@triton.jit
def attend_tiles(
    q,
    k_ptr,
    v_ptr,
    limit,
    begin,
    end,
    step,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(acc [HEAD_DIM, rows], peak [rows], total [rows]) over the tiles at begin, begin + step, ... before end.

    q [HEAD_DIM, rows]; k_ptr and v_ptr point to slot 0; row i sees slots up to limit[i]. peak is finite where a row sees nothing.
    """
    slot = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    acc = tl.zeros((HEAD_DIM, BLOCK_M), tl.float32)
    peak = tl.full((BLOCK_M,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(begin, end, step):
        # slots behind the last may hold NaN, which a probability of zero would not undo: the last is read in their place
        at = tl.minimum(slot, end - 1 - first) * HEAD_DIM
        k = tl.load(k_ptr + first * HEAD_DIM + (at[:, None] + d[None, :]), eviction_policy="evict_first")
        v = tl.load(v_ptr + first * HEAD_DIM + (at[None, :] + d[:, None]), eviction_policy="evict_first")
        scores = tl.dot(k, q, input_precision="ieee")
        scores = tl.where(slot[:, None] <= (limit - first)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 0) * factor)
        p = tl.exp2(scores * factor - higher[None, :])  # one fused multiply-add a score; factor is positive
        fade = tl.exp2(peak - higher)
        acc = tl.dot(v, p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
        total = total * fade + tl.sum(p, 0)
        peak = higher
    return acc, peak, total


@triton.jit
def join(sums_ptr, weights_ptr, active, first, rows, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr):
    """The sums of `active` programs as one: sums [programs, rows, HEAD_DIM], weights [programs, rows, 2] (peak, total).

    Returns float32 [BLOCK_R, HEAD_DIM], from row `first` on. CHUNK programs at a time: one long wait instead of many.
    """
    part = tl.arange(0, CHUNK)[:, None]
    row = first + tl.arange(0, BLOCK_R)[None, :]
    d = tl.arange(0, HEAD_DIM)[None, None, :]
    acc = tl.zeros((BLOCK_R, HEAD_DIM), tl.float32)
    peak = tl.full((BLOCK_R,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for begin in range(0, active, CHUNK):
        real = (begin + part < active) & (row < rows)
        at = (begin + part) * rows + row
        sums = tl.load(sums_ptr + (at[:, :, None] * HEAD_DIM + d), mask=real[:, :, None], other=0.0, cache_modifier=".cg")
        peaks = tl.load(weights_ptr + at * 2, mask=real, other=-3.0e38, cache_modifier=".cg")
        totals = tl.load(weights_ptr + at * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(peaks, 0))
        fade, weight = tl.exp2(peak - higher), tl.exp2(peaks - higher[None, :])
        acc = acc * fade[:, None] + tl.sum(sums * weight[:, :, None], 0)
        total = total * fade + tl.sum(totals * weight, 0)
        peak = higher
    return acc / tl.where(total > 0, total, 1.0)[:, None]
