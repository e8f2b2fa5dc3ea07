"""A draw from the keys of a row's scores: what top-k and top-p leave of them, and the inversion of the cumulative distribution.

    kept = {key >= T}, T the lowest key with count(key > T) < k  and, of those, the lowest with mass(key > T) < top_p * mass

A key is a score as an integer of the same order. T is found without sorting: a pass over the keys halves T's interval and moves
both ends on to keys that occur, until one is left, after 10 to 20 passes. So that these are short, a first cut takes out what can't
stay, and the rest moves together in the order of the vocabulary: keys below the k-th largest of the maxima of LANES sets of tokens,
or, for top_p alone, tokens whose masses can't sum up to 1 - top_p even if all were equal. Sums are formed in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-2139095041)  # the key of -inf
LOWEST = tl.constexpr(-2147483648)
HIGHEST = tl.constexpr(2147483647)


@triton.jit
def to_key(score):
    """Integers in the order of the floats, the two zeros being one."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(key, best):
    """exp(score - best); nothing for a token at -inf."""
    return tl.where(key > NOTHING, tl.exp(_score(key) - best), 0.0)


@triton.jit
def _filtered(keys_ptr, count, low, top, best, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest key that stays, of those from `low` to `top`, when above it there is less than `wanted`, a count or a mass."""
    lane = tl.arange(0, BLOCK)
    under = low.to(tl.int64) - 1  # above it there is enough
    over = top.to(tl.int64)  # above it there is not
    while over - under > 1:
        split = (under + (over - under) // 2).to(tl.int32)
        amount = tl.zeros((BLOCK,), tl.float32)
        lower = tl.full((BLOCK,), LOWEST, tl.int32)
        upper = tl.full((BLOCK,), HIGHEST, tl.int32)
        for begin in range(0, count, BLOCK):
            key = tl.load(keys_ptr + begin + lane)
            above = key > split
            amount += tl.where(above, 1.0 if COUNT else _mass(key, best), 0.0)
            lower = tl.maximum(lower, tl.where(above, LOWEST, key))
            upper = tl.minimum(upper, tl.where(above, key, HIGHEST))
        if tl.sum(amount, 0) >= wanted:
            under = tl.minimum(tl.min(upper, 0).to(tl.int64), over) - 1
        else:
            over = tl.maximum(tl.max(lower, 0).to(tl.int64), under + 1)
    return over.to(tl.int32)


@triton.jit
def _total(keys_ptr, count, low, best, BLOCK: tl.constexpr):
    """The mass from `low` on, block by block."""
    total = 0.0
    for begin in range(0, count, BLOCK):
        key = tl.load(keys_ptr + begin + tl.arange(0, BLOCK))
        total += tl.sum(tl.where(key >= low, _mass(key, best), 0.0), 0)
    return total


@triton.jit
def _drawn(keys_ptr, count, low, best, uniform, BLOCK: tl.constexpr):
    """The first place whose cumulative mass exceeds uniform * total; the last one that was kept, where rounding leaves none."""
    aim = uniform * _total(keys_ptr, count, low, best, BLOCK)
    lane = tl.arange(0, BLOCK)
    passed = 0.0  # the mass of the blocks so far
    block, before = 0, 0.0  # the block that holds the token, and the mass before it
    for begin in range(0, count, BLOCK):
        key = tl.load(keys_ptr + begin + lane)
        mass = tl.sum(tl.where(key >= low, _mass(key, best), 0.0), 0)
        if (mass > 0) & (passed <= aim):
            block, before = begin, passed
        passed += mass
    key = tl.load(keys_ptr + block + lane)
    kept = (key >= low) & (key > NOTHING)
    cumulative = before + tl.cumsum(tl.where(kept, _mass(key, best), 0.0), 0)
    first = tl.min(tl.where(kept & (cumulative > aim), lane, BLOCK), 0)
    last = tl.max(tl.where(kept, lane, 0), 0)
    return block + tl.minimum(first, last)


@triton.jit
def _moved(keys_ptr, few_ptr, ids_ptr, vocab, pivot, BLOCK: tl.constexpr, FEW: tl.constexpr):
    """Copy the keys from `pivot` on to few_ptr, in order and up to a whole block, and their tokens to ids_ptr: their number."""
    lane = tl.arange(0, BLOCK)
    count = 0
    for begin in range(0, vocab, BLOCK):
        key = tl.load(keys_ptr + begin + lane)
        keep = (key >= pivot) & (begin + lane < vocab)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(few_ptr + place, key, mask=keep)
        tl.store(ids_ptr + place, begin + lane, mask=keep)
        count += tl.sum(keep.to(tl.int32), 0)
    tl.store(few_ptr + count + tl.arange(0, FEW), tl.full((FEW,), LOWEST, tl.int32))
    tl.debug_barrier()
    return count


@triton.jit
def _filtered_token(keys_ptr, peaks, vocab, space, top, best, top_k, top_p, uniform, BLOCK: tl.constexpr, FEW: tl.constexpr):
    LANES: tl.constexpr = peaks.shape[0]
    few_ptr, ids_ptr = keys_ptr + space, keys_ptr + 2 * space
    counted = (top_k > 0) & (top_k < vocab)
    pivot = tl.full((), NOTHING, tl.int32)
    mass = 0.0
    if counted:
        if top_k <= LANES:  # as many tokens at least are not below this
            tl.store(few_ptr + tl.arange(0, LANES), peaks)
            tl.debug_barrier()
            pivot = _filtered(few_ptr, LANES, pivot, top, best, top_k, True, FEW)
            tl.debug_barrier()
    else:
        mass = _total(keys_ptr, vocab, pivot, best, BLOCK)
        share = 0.99 * (1.0 - top_p) * mass / vocab  # less than it should be, for the sake of rounding
        pivot = tl.minimum(to_key(best + tl.log(share)), top)
    count = _moved(keys_ptr, few_ptr, ids_ptr, vocab, pivot, LANES, FEW)
    low = pivot
    if counted:
        low = _filtered(few_ptr, count, low, top, best, top_k, True, FEW)
        mass = _total(few_ptr, count, low, best, FEW)
    if top_p < 1.0:
        low = _filtered(few_ptr, count, low, top, best, top_p * mass, False, FEW)
    return tl.load(ids_ptr + _drawn(few_ptr, count, low, best, uniform, FEW))


@triton.jit
def choose(keys_ptr, peaks, vocab, space, top, top_k, top_p, uniform, BLOCK: tl.constexpr, FEW: tl.constexpr):
    """A token of a row whose keys, NOTHING behind the vocabulary up to whole blocks, stand at keys_ptr, `top` the largest.

    peaks [LANES]: the largest key of each set of tokens that are equal modulo LANES. Two more regions of `space` values follow on
    the keys' own: scratch. `space` is a multiple of FEW, and by FEW at least above the vocabulary.
    """
    tl.debug_barrier()  # the keys are read by other threads than those that wrote them
    best = _score(top)
    if ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0):
        token = _filtered_token(keys_ptr, peaks, vocab, space, top, best, top_k, top_p, uniform, BLOCK, FEW)
    else:
        token = _drawn(keys_ptr, vocab, tl.full((), NOTHING, tl.int32), best, uniform, BLOCK)
    return token
