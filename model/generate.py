"""The decode loop: prefill in chunks, choose, step, until every row has ended.

Two crossings between host and device: the prompt goes in, tokens come out. On a GPU the step is a captured graph and tokens are
read every few steps; on a CPU the same step runs eagerly and is read each time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from granite_kernels.ops import Ops

from . import granite
from .cache import Cache
from .config import GraniteConfig
from .request import Request
from .step import State, first, step

CHUNK = {"cpu": 256, "cuda": 2048}  # prompt tokens a pass: bounds the scores and the logits, whatever the prompt's length
READ_EVERY = {"cpu": 1, "cuda": 4}  # steps between two looks at the tokens


@dataclasses.dataclass
class Stats:
    """What the last generation did: tokens of one row, seconds, prompt tokens found in a kept cache."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the steps alone: the first token comes out of the prompt."""
        return (self.new_tokens - 1) / self.generation_seconds if self.generation_seconds > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model ready to run: its weights, its operations and the rotation table for the context at hand."""

    config: GraniteConfig
    weights: granite.Weights
    ops: Ops
    rotary: Tensor


def hidden(engine: Engine, ids: Tensor, positions: Tensor, cache: Cache, keep: int) -> Tensor:
    """Run ids [batch, tokens] in chunks; returns the stream of the last `keep` positions, and advances the cache."""
    tokens, kept = ids.shape[1], []
    chunk = CHUNK[ids.device.type]
    for begin in range(0, tokens, chunk):
        part = slice(begin, min(begin + chunk, tokens))
        inputs = granite.Inputs(ids[:, part], positions[:, part].contiguous(), engine.rotary)
        x = granite.forward(engine.config, engine.weights, inputs, cache, engine.ops)
        cache.advance(part.stop - begin)
        wanted = part.stop - max(begin, tokens - keep)
        if wanted > 0:
            kept.append(x[:, -wanted:])
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)


def slot_positions(starts: Tensor, first_slot: int, tokens: int) -> Tensor:
    """Rotary positions int32 [batch, tokens] of the slots from first_slot on; 0 within a row's padding."""
    slots = torch.arange(first_slot, first_slot + tokens, dtype=torch.int32, device=starts.device)
    return (slots - starts[:, None]).clamp_(min=0)


def prefill(engine: Engine, request: Request, cache: Cache, state: State) -> None:
    """Run what of the prompt the cache doesn't hold yet, and choose the first token."""
    done = cache.length
    positions = slot_positions(cache.starts, done, request.prompt_tokens - done)
    x = hidden(engine, request.ids[:, done:], positions, cache, keep=1)
    state.begin(request.ids, request.present, positions[:, -1] + 1, request.sampling, request.seed)
    first(state, granite.logits(engine.config, engine.weights, x, engine.ops)[:, -1], cache, engine.ops)


def eager_step(engine: Engine, state: State, cache: Cache, out: Tensor | None = None) -> Callable[[], None]:
    """The decode step as a callable without arguments: what runs on a CPU, and what a graph captures. `out`: as for `step`."""
    return lambda: step(engine.config, engine.weights, engine.rotary, state, cache, engine.ops, out)


def decode(request: Request, cache: Cache, state: State, run: Callable[[], None]) -> Iterator[list[list[int]]]:
    """Yield blocks of new tokens, [steps][batch], the first token first; the caller stops by closing the iterator."""
    every = READ_EVERY[request.ids.device.type]
    taken, total = 1, request.max_new_tokens
    yield state.tokens[:, :1].T.tolist()
    while taken < total:
        count = min(every, total - taken)
        for _ in range(count):
            run()
        cache.length += count
        block = state.tokens[:, taken : taken + count].T.tolist()  # waits for the device
        taken += count
        yield block


@torch.no_grad()
def generate(
    engine: Engine, request: Request, cache: Cache, state: State, run: Callable[[], None], stats: Stats
) -> Iterator[list[int | None]]:
    """Yield one token a row and step; None for a row that has ended. An end token is yielded, then its row has ended.

    The cache ends up holding exactly the tokens that were yielded, the last one excepted (batch of one).
    """
    begun = time.perf_counter()
    stats.prompt_tokens, stats.cached_tokens = request.prompt_tokens, cache.length
    prefill(engine, request, cache, state)
    live = [True] * request.batch
    blocks = decode(request, cache, state, run)
    started = None
    try:
        for block in blocks:
            now = time.perf_counter()
            if started is None:
                started = now
                stats.prompt_seconds = now - begun
            stats.generation_seconds = now - started
            for tokens in block:
                stats.new_tokens += 1
                yield [token if alive else None for token, alive in zip(tokens, live, strict=True)]
                live = [alive and token not in request.eos for token, alive in zip(tokens, live, strict=True)]
                if not any(live):
                    return
    finally:
        cache.crop(request.prompt_tokens + max(stats.new_tokens - 1, 0))
