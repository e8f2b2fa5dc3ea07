"""The choice of the next token, one program a row: penalty, temperature, top-k, top-p, inversion of the cumulative distribution.

Greedy is one pass over the logits: 98 KB for Granite's 49,155 in 16 bits, about 2 us for one multiprocessor. Thresholds are found
without sorting: logits become integers of the same order, and 32 halvings find the largest integer that at least k logits reach, or
the smallest above which less than top_p of the mass lies. The passes read L2: some 50 us for each of the two, when asked for. Counts
and masses are summed in a fixed order. All settings are read from memory, so that a captured graph replays with other ones.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.launch import target

BLOCK = 8192
WARPS = 16


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    values = grid[0] * args["vocab"]
    return {"name": kernel.name, "flops": 2 * values, "bytes": values * args["logits_ptr"].element_size()}


@triton.jit
def _scores(logits_ptr, seen_ptr, begin, vocab, temperature, penalty, BLOCK: tl.constexpr):
    """Logits begin .. begin + BLOCK - 1 of the row after penalty and temperature; -inf behind the vocabulary and for NaN."""
    at = begin + tl.arange(0, BLOCK)
    inside = at < vocab
    score = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    score = tl.where(score == score, score, float("-inf"))
    if penalty != 1.0:
        seen = tl.load(seen_ptr + at, mask=inside, other=0) != 0
        score = tl.where(seen, tl.where(score > 0, tl.div_rn(score, penalty), score * penalty), score)
    return tl.div_rn(score, temperature), at


@triton.jit
def _order(score):
    """Integers in the order of the floats."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best(logits_ptr, seen_ptr, vocab, temperature, penalty, BLOCK: tl.constexpr):
    """(largest score, its lowest index)"""
    best, index = -float("inf"), 0
    for begin in range(0, vocab, BLOCK):
        score, _ = _scores(logits_ptr, seen_ptr, begin, vocab, temperature, penalty, BLOCK)
        top = tl.max(score, 0)
        where = begin + tl.argmax(score, 0, tie_break_left=True)
        index = tl.where(top > best, where, index)
        best = tl.maximum(top, best)
    return best, index


@triton.jit
def _reached(logits_ptr, seen_ptr, vocab, temperature, penalty, best, low, threshold, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT: how many scores have an order of at least `threshold`; else the mass of those above it, among those from `low` on."""
    total = 0.0
    for begin in range(0, vocab, BLOCK):
        score, at = _scores(logits_ptr, seen_ptr, begin, vocab, temperature, penalty, BLOCK)
        key = _order(score)
        if COUNT:
            total += tl.sum(((key >= threshold) & (at < vocab)).to(tl.float32), 0)  # exact up to 2^24
        else:
            total += tl.sum(tl.where((key > threshold) & (key >= low), tl.exp(score - best), 0.0), 0)
    return total


@triton.jit
def _kept_from(logits_ptr, seen_ptr, vocab, temperature, penalty, best, top_k, top_p, BLOCK: tl.constexpr):
    """The smallest order that survives top-k and top-p."""
    low = -2147483648
    if (top_k > 0) & (top_k < vocab):
        threshold = 0
        if _reached(logits_ptr, seen_ptr, vocab, temperature, penalty, best, low, 0, True, BLOCK) < top_k:
            threshold = -2147483648
        for bit in range(30, -1, -1):  # the largest order that at least top_k scores reach
            trial = threshold + (1 << bit)
            if _reached(logits_ptr, seen_ptr, vocab, temperature, penalty, best, low, trial, True, BLOCK) >= top_k:
                threshold = trial
        low = threshold
    if top_p < 1.0:
        wanted = top_p * _reached(logits_ptr, seen_ptr, vocab, temperature, penalty, best, low, -2147483648, False, BLOCK)
        threshold = 0
        if _reached(logits_ptr, seen_ptr, vocab, temperature, penalty, best, low, 0, False, BLOCK) < wanted:
            threshold = -2147483648
        for bit in range(30, -1, -1):  # the largest order above which there is still enough
            trial = threshold + (1 << bit)
            if _reached(logits_ptr, seen_ptr, vocab, temperature, penalty, best, low, trial, False, BLOCK) >= wanted:
                threshold = trial
        low = tl.maximum(low, threshold + 1)
    return low


@triton.jit
def _drawn(logits_ptr, seen_ptr, vocab, temperature, penalty, best, low, uniform, BLOCK: tl.constexpr):
    """The first index whose cumulative mass exceeds uniform * total, the last one that was kept at most."""
    total = 0.0
    last = 0
    for begin in range(0, vocab, BLOCK):
        score, at = _scores(logits_ptr, seen_ptr, begin, vocab, temperature, penalty, BLOCK)
        kept = (_order(score) >= low) & (score > -float("inf"))
        total += tl.sum(tl.where(kept, tl.exp(score - best), 0.0), 0)
        last = tl.maximum(last, tl.max(tl.where(kept, at, 0), 0))
    aim = uniform * total
    before = 0.0
    count = 0
    for begin in range(0, vocab, BLOCK):
        score, at = _scores(logits_ptr, seen_ptr, begin, vocab, temperature, penalty, BLOCK)
        kept = (_order(score) >= low) & (score > -float("inf"))
        mass = tl.where(kept, tl.exp(score - best), 0.0)
        count += tl.sum(((before + tl.cumsum(mass, 0) <= aim) & (at < vocab)).to(tl.int32), 0)
        before += tl.sum(mass, 0)
    return tl.minimum(count, last)


@triton.jit(do_not_specialize=["logits_stride_row"], launch_metadata=_cost)
def _sample_kernel(
    logits_ptr,  # [batch, vocab], rows logits_stride_row apart
    uniforms_ptr,  # float32 [batch], or [capacity, batch] where STEP
    seen_ptr,  # uint8 [batch, vocab]
    sampling_ptr,  # float32 [4]: temperature, top_k, top_p, penalty
    out_ptr,  # int64 [batch]; where STEP ids [batch, 1]
    positions_ptr,  # int32 [batch], moved on where STEP, as the next two
    lengths_ptr,
    steps_ptr,
    tokens_ptr,  # int64 [batch, capacity]
    logits_stride_row,
    vocab,
    capacity,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride_row
    seen_ptr += row * vocab
    temperature = tl.load(sampling_ptr)
    penalty = tl.load(sampling_ptr + 3)
    heat = tl.where(temperature > 0, temperature, 1.0)
    best, chosen = _best(logits_ptr, seen_ptr, vocab, heat, penalty, BLOCK)
    step = tl.load(steps_ptr + row).to(tl.int64) if STEP else row * 0
    if temperature > 0:
        low = _kept_from(logits_ptr, seen_ptr, vocab, heat, penalty, best, tl.load(sampling_ptr + 1), tl.load(sampling_ptr + 2), BLOCK)
        uniform = tl.load(uniforms_ptr + step * tl.num_programs(0) + row)
        chosen = _drawn(logits_ptr, seen_ptr, vocab, heat, penalty, best, low, uniform, BLOCK)
    tl.store(out_ptr + row, chosen.to(tl.int64))
    if STEP:
        tl.store(tokens_ptr + row * capacity + step, chosen.to(tl.int64))
        tl.store(seen_ptr + chosen, 1)
        tl.store(positions_ptr + row, tl.load(positions_ptr + row) + 1)
        tl.store(lengths_ptr + row, tl.load(lengths_ptr + row) + 1)
        tl.store(steps_ptr + row, (step + 1).to(tl.int32))


def _launch(
    logits: Tensor,
    uniforms: Tensor,
    seen: Tensor,
    sampling: Tensor,
    out: Tensor,
    counters: tuple[Tensor, ...],
    tokens: Tensor,
    *,
    step: bool,
) -> None:
    pdl = logits.is_cuda and target(logits).arch >= 90
    _sample_kernel[(logits.shape[0],)](
        logits,
        uniforms,
        seen,
        sampling,
        out,
        *counters,
        tokens,
        logits.stride(0),
        logits.shape[1],
        tokens.shape[-1],
        BLOCK=BLOCK,
        STEP=step,
        PDL=pdl,
        num_warps=WARPS,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if pdl else {}),
    )


@torch.library.custom_op("granite_kernels::sample", mutates_args=())
def _sample(logits: Tensor, uniforms: Tensor, seen: Tensor, sampling: Tensor) -> Tensor:
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _launch(logits, uniforms, seen, sampling, out, (out, out, out), out, step=False)
    return out


@_sample.register_fake
def _(logits: Tensor, uniforms: Tensor, seen: Tensor, sampling: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)


@torch.library.custom_op("granite_kernels::sample_step", mutates_args=("seen", "ids", "positions", "lengths", "steps", "tokens"))
def _sample_step(
    logits: Tensor,
    uniforms: Tensor,
    seen: Tensor,
    sampling: Tensor,
    ids: Tensor,
    positions: Tensor,
    lengths: Tensor,
    steps: Tensor,
    tokens: Tensor,
) -> None:
    _launch(logits, uniforms, seen, sampling, ids, (positions, lengths, steps), tokens, step=True)


@_sample_step.register_fake
def _(
    logits: Tensor,
    uniforms: Tensor,
    seen: Tensor,
    sampling: Tensor,
    ids: Tensor,
    positions: Tensor,
    lengths: Tensor,
    steps: Tensor,
    tokens: Tensor,
) -> None:
    return None


def sample(logits: Tensor, uniforms: Tensor, seen: Tensor, sampling: Tensor) -> Tensor:
    """One token a row: int64 [batch].

    logits [batch, vocab]; uniforms float32 [batch] in [0, 1); seen uint8 [batch, vocab], 1 where the token occurred (for the
    penalty); sampling float32 [4]: temperature (0: greedy), top_k (0: off), top_p (1: off), repetition penalty (1: off).
    """
    chosen: Tensor = _sample(logits, uniforms, seen, sampling)
    return chosen


def sample_step(
    logits: Tensor,
    uniforms: Tensor,
    seen: Tensor,
    sampling: Tensor,
    ids: Tensor,
    positions: Tensor,
    lengths: Tensor,
    steps: Tensor,
    tokens: Tensor,
) -> None:
    """Choose the next tokens and move the state of a decode step on by one, all on the device.

    logits [batch, vocab]; uniforms float32 [capacity, batch], row steps[b] is used for row b; seen uint8 [batch, vocab];
    sampling as in `sample`. Written: ids int64 [batch, 1], the input of the next step; tokens int64 [batch, capacity] at column
    steps[b]; seen at the chosen token; positions int32 [batch, 1], lengths int32 [batch] and steps int32 [batch], each plus one.
    """
    _sample_step(logits, uniforms, seen, sampling, ids, positions, lengths, steps, tokens)
