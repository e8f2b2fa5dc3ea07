"""One decode step over static buffers: what runs eagerly, token after token, and what the CUDA graph captures.

Everything the step reads or writes is here and on the device; the host reads nothing to go on.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from granite_kernels.ops import Ops

from . import granite
from .cache import Cache, round_up
from .config import GraniteConfig


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True)
class State:
    """The buffers of a decode. Row b of the batch has taken steps[b] steps; uniforms row s is for step s.

    ids int64 [batch, 1], positions int32 [batch, 1], steps int32 [batch], tokens int64 [batch, capacity],
    uniforms float32 [capacity, batch], seen uint8 [batch, vocab], sampling float32 [4].
    """

    ids: Tensor
    positions: Tensor
    steps: Tensor
    tokens: Tensor
    uniforms: Tensor
    seen: Tensor
    sampling: Tensor

    @classmethod
    def allocate(cls, batch: int, capacity: int, vocab: int, device: torch.device) -> State:
        capacity = round_up(capacity)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            ids=zeros(batch, 1, dtype=torch.int64),
            positions=zeros(batch, 1, dtype=torch.int32),
            steps=zeros(batch, dtype=torch.int32),
            tokens=zeros(batch, capacity, dtype=torch.int64),
            uniforms=zeros(capacity, batch, dtype=torch.float32),
            seen=zeros(batch, vocab, dtype=torch.uint8),
            sampling=zeros(4, dtype=torch.float32),
        )

    def fits(self, batch: int, capacity: int) -> bool:
        return self.tokens.shape[0] == batch and self.tokens.shape[1] >= capacity

    def begin(self, prompt: Tensor, present: Tensor, positions: Tensor, sampling: Sampling, seed: int) -> None:
        """Set the buffers for a prompt [batch, tokens], `present` where it isn't padding; positions int32 [batch] of the next token."""
        settings = (sampling.temperature, float(sampling.top_k), sampling.top_p, sampling.repetition_penalty)
        self.sampling.copy_(torch.tensor(settings))
        self.steps.zero_()
        self.positions.copy_(positions[:, None])
        self.seen.zero_()
        if sampling.repetition_penalty != 1.0:
            self.seen.scatter_(1, torch.where(present, prompt, prompt[:, -1:]), 1)  # padding has not been said
        if sampling.temperature > 0:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device
            self.uniforms.copy_(torch.rand(self.uniforms.shape, generator=generator))

    def snapshot(self, cache: Cache) -> list[tuple[Tensor, Tensor]]:
        """(buffer, copy) of all that a step changes, the cache's slots excepted."""
        changed = (self.ids, self.positions, self.steps, self.tokens, self.seen, cache.lengths)
        return [(buffer, buffer.clone()) for buffer in changed]


def first(state: State, logits: Tensor, cache: Cache, ops: Ops) -> None:
    """Choose the first new token from the prompt's last logits [batch, vocab]."""
    ops.sample_step(
        logits, state.uniforms, state.seen, state.sampling, state.ids, state.positions, cache.lengths, state.steps, state.tokens
    )
    state.positions.sub_(1)  # the prompt is counted already: only a token that went through the layers moves these on
    cache.lengths.sub_(1)


def step(
    config: GraniteConfig, weights: granite.Weights, rotary: Tensor, state: State, cache: Cache, ops: Ops, out: Tensor | None = None
) -> None:
    """Run the token state.ids through the model and choose the next one; or, with `out` [batch, vocab], leave the choice to its reader."""
    x = granite.forward(config, weights, granite.Inputs(state.ids, state.positions, rotary), cache, ops)
    logits = granite.logits(config, weights, x, ops)[:, -1]
    if out is not None:
        out.copy_(logits)
        for counter in (state.positions, cache.lengths):
            counter += 1
        return
    ops.sample_step(
        logits, state.uniforms, state.seen, state.sampling, state.ids, state.positions, cache.lengths, state.steps, state.tokens
    )
