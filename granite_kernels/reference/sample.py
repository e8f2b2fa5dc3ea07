"""The choice of the next token: repetition penalty, temperature, top-k, top-p, then inversion of the cumulative distribution.

Order and meaning are transformers': a seen token's positive logit is divided by the penalty, a negative one multiplied; top-k
keeps every logit not below the k-th largest; top-p keeps a token while the tokens with a larger logit hold less than top_p, so that
equal logits stay or go together. The token is the first whose cumulative probability, in the order of the vocabulary, exceeds the
uniform number, which comes in from outside: the same numbers give the same tokens on every backend. Ties of the greedy choice go
to the lower id.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _filtered(logits: Tensor, seen: Tensor, temperature: float, top_k: int, top_p: float, penalty: float) -> Tensor:
    scores = logits.double() if logits.dtype == torch.float64 else logits.float()
    if penalty != 1.0:
        scores = torch.where(seen.bool(), torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if temperature == 0.0:
        return scores
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        kth = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if top_p < 1.0:
        ordered = scores.sort(dim=-1, descending=True).values
        above = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        above[:, 0] = 0.0
        kept = (above < top_p).sum(-1, keepdim=True)  # in order; an equal logit behind the last one kept is kept with it
        scores = scores.masked_fill(scores < ordered.gather(-1, kept - 1), float("-inf"))
    return scores


def sample(logits: Tensor, uniforms: Tensor, seen: Tensor, sampling: Tensor) -> Tensor:
    """One token a row: int64 [batch].

    logits [batch, vocab]; uniforms float32 [batch] in [0, 1); seen uint8 [batch, vocab], 1 where the token occurred (for the
    penalty); sampling float32 [4]: temperature (0: greedy), top_k (0: off), top_p (1: off), repetition penalty (1: off).
    """
    temperature, top_k, top_p, penalty = sampling.tolist()
    scores = _filtered(logits, seen, temperature, int(top_k), top_p, penalty)
    if temperature == 0.0:
        return scores.argmax(-1)
    cumulative = scores.softmax(-1).cumsum(-1)
    drawn = uniforms.to(scores.dtype)[:, None] * cumulative[:, -1:]
    last = logits.shape[-1] - 1 - (scores > float("-inf")).flip(-1).int().argmax(-1)  # rounding may carry the number past the end
    return (cumulative <= drawn).sum(-1).minimum(last)


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
    rows = torch.arange(logits.shape[0], device=logits.device)
    chosen = sample(logits, uniforms[steps.long(), rows], seen, sampling)
    ids.copy_(chosen[:, None])
    tokens[rows, steps.long()] = chosen
    seen[rows, chosen] = 1
    for counter in (positions, lengths, steps):
        counter += 1
