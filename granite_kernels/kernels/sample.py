"""The choice of the next token, one program a row: penalty, temperature, top-k, top-p, inversion of the cumulative distribution.

Greedy is one pass over the logits: 98 KB for Granite's 49,155 in 16 bits. For the rest that pass leaves the scores as integer keys,
4 bytes a token, in L2, and `choice` draws from them. Counted in whole rows of keys, that reads 2.5 without a filter, 3 with top-k
and 3 to 13 with top-p alone, more where the distribution is flat; at 64 bytes a clock, which L2 gives one multiprocessor, a row is
2 us (a model, not a measurement). All settings are read from memory, so that a captured graph replays with other ones.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.errors import GraniteError
from granite_kernels.kernels.choice import NOTHING, choose, to_key
from granite_kernels.launch import DTYPES, target
from granite_kernels.operation import operation

BLOCK = 8192  # keys a pass takes at a time; the first pass, which divides as well, takes half of it to keep its registers
WARPS = 16
FEW = 2048  # keys a pass takes at a time of those that a first cut left


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    values = grid[0] * args["vocab"]
    return {"name": kernel.name, "flops": 2 * values, "bytes": values * args["logits_ptr"].element_size()}


@triton.jit
def _read(logits_ptr, seen_ptr, keys_ptr, vocab, temperature, penalty, BLOCK: tl.constexpr):
    """(largest key a lane, largest key, its lowest index). Leaves all keys, NaN's being -inf's, where there is a temperature."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), NOTHING - 1, tl.int32)
    index = tl.full((BLOCK,), 0, tl.int32)
    for begin in range(0, tl.cdiv(vocab, 2 * BLOCK) * 2 * BLOCK, BLOCK):
        at = begin + lane
        score = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        score = tl.where(score == score, score, float("-inf"))
        if penalty != 1.0:
            seen = tl.load(seen_ptr + at, mask=at < vocab, other=0) != 0
            score = tl.where(seen, tl.where(score > 0, tl.div_rn(score, penalty), score * penalty), score)
        if temperature > 0:
            key = tl.maximum(to_key(tl.div_rn(score, temperature)), NOTHING)
            tl.store(keys_ptr + at, key)  # behind the vocabulary as well: the passes read whole blocks of twice this size
        else:
            key = to_key(score)
        index = tl.where(key > best, at, index)
        best = tl.maximum(key, best)
    top = tl.max(best, 0)
    return best, top, tl.min(tl.where(best == top, index, 2147483647), 0)


@triton.jit(do_not_specialize=["logits_stride_row", "capacity"], launch_metadata=_cost)
def _sample_kernel(
    logits_ptr,  # [batch, vocab], rows logits_stride_row apart
    uniforms_ptr,  # float32 [batch], or [capacity, batch] where STEP
    seen_ptr,  # uint8 [batch, vocab]
    sampling_ptr,  # float32 [4]: temperature, top_k, top_p, penalty
    keys_ptr,  # int32 [batch, 3, space], scratch
    out_ptr,  # int64 [batch]; where STEP ids [batch, 1]
    positions_ptr,  # int32 [batch], moved on where STEP, as the next two
    lengths_ptr,
    steps_ptr,
    tokens_ptr,  # int64 [batch, capacity]
    logits_stride_row,
    vocab,
    capacity,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride_row
    seen_ptr += row * vocab
    space = (tl.cdiv(vocab, BLOCK) + 1) * BLOCK
    keys_ptr += row * 3 * space
    temperature = tl.load(sampling_ptr)
    peaks, top, chosen = _read(logits_ptr, seen_ptr, keys_ptr, vocab, temperature, tl.load(sampling_ptr + 3), BLOCK // 2)
    step = tl.load(steps_ptr + row).to(tl.int64) if STEP else row * 0
    room = (step < capacity) if STEP else True  # a row that goes on behind the end of its buffers spoils nothing
    if temperature > 0:
        uniform = tl.load(uniforms_ptr + step * tl.num_programs(0) + row, mask=room, other=0.0)
        top_k, top_p = tl.load(sampling_ptr + 1), tl.load(sampling_ptr + 2)
        chosen = choose(keys_ptr, peaks, vocab, space, top, top_k, top_p, uniform, BLOCK, FEW)
    tl.store(out_ptr + row, chosen.to(tl.int64))
    if STEP:
        tl.store(tokens_ptr + row * capacity + step, chosen.to(tl.int64), mask=room)
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
    batch, vocab = logits.shape
    pdl = logits.is_cuda and target(logits).arch >= 90
    _sample_kernel[(batch,)](
        logits,
        uniforms,
        seen,
        sampling,
        torch.empty(batch, 3, (triton.cdiv(vocab, BLOCK) + 1) * BLOCK, dtype=torch.int32, device=logits.device),
        out,
        *counters,
        tokens,
        logits.stride(0),
        vocab,
        tokens.shape[-1],
        BLOCK=BLOCK,
        FEW=FEW,
        STEP=step,
        PDL=pdl,
        num_warps=WARPS,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if pdl else {}),
    )


@operation("granite_kernels::sample", mutates_args=())
def _sample(logits: Tensor, uniforms: Tensor, seen: Tensor, sampling: Tensor) -> Tensor:
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _launch(logits, uniforms, seen, sampling, out, (out, out, out), out, step=False)
    return out


@_sample.register_fake
def _(logits: Tensor, uniforms: Tensor, seen: Tensor, sampling: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)


@operation("granite_kernels::sample_step", mutates_args=("seen", "ids", "positions", "lengths", "steps", "tokens"))
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


def _check(logits: Tensor, uniforms: Tensor, seen: Tensor, sampling: Tensor) -> None:
    batch, vocab = logits.shape
    if seen.shape != logits.shape or uniforms.shape != (batch,) or sampling.shape != (4,):
        shapes = f"{tuple(uniforms.shape)}, {tuple(seen.shape)} and {tuple(sampling.shape)}"
        raise GraniteError(f"uniforms, seen and sampling are {shapes}: expected ({batch},), ({batch}, {vocab}) and (4,), by the logits")
    if logits.dtype not in DTYPES:
        raise GraniteError(f"the logits are {logits.dtype}: expected float32, bfloat16 or float16")
    if (uniforms.dtype, seen.dtype, sampling.dtype) != (torch.float32, torch.uint8, torch.float32):
        raise GraniteError(
            f"uniforms, seen and sampling are {uniforms.dtype}, {seen.dtype}, {sampling.dtype}: expected float32, uint8, float32"
        )
    if logits.stride(1) != 1 or not all(t.is_contiguous() for t in (uniforms, seen, sampling)):
        raise GraniteError("uniforms, seen, sampling and the rows of the logits must be contiguous")


def sample(logits: Tensor, uniforms: Tensor, seen: Tensor, sampling: Tensor) -> Tensor:
    """One token a row: int64 [batch].

    logits [batch, vocab]; uniforms float32 [batch] in [0, 1); seen uint8 [batch, vocab], 1 where the token occurred (for the
    penalty); sampling float32 [4]: temperature (0: greedy), top_k (0: off), top_p (1: off), repetition penalty (1: off).
    """
    _check(logits, uniforms, seen, sampling)
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
    batch = logits.shape[0]
    _check(logits, uniforms[:1].view(-1), seen, sampling)
    counters = positions.numel(), lengths.numel(), steps.numel()
    if ids.shape != (batch, 1) or tokens.shape != (batch, uniforms.shape[0]) or counters != (batch, batch, batch):
        raise GraniteError(f"the state's tensors must have a row, and the tokens a column for each of {uniforms.shape[0]} uniforms a row")
    if {ids.dtype, tokens.dtype} != {torch.int64} or {t.dtype for t in (positions, lengths, steps)} != {torch.int32}:
        raise GraniteError("ids and tokens must be int64; positions, lengths and steps int32")
    if not all(t.is_contiguous() for t in (uniforms, ids, positions, lengths, steps, tokens)):
        raise GraniteError("the state's tensors must be contiguous")
    _sample_step(logits, uniforms, seen, sampling, ids, positions, lengths, steps, tokens)
