"""One prefill and some decode steps of a model under torch's profiler: time by role and by kernel, held against the roof.

(Not called profile.py: run as a script, anything in this folder would hide the standard library's module of that name.)

The steps run eagerly. A captured step replays the same kernels, but whose they are is lost then: neither ranges nor `launch_metadata`
are seen again. What it costs to launch them one by one lies between the kernels. `Phase.wall` is the same work without a profiler, as
`generate` does it (captured, on a GPU), so that the difference shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from granite_kernels.model import generate as generation
from granite_kernels.model.cache import Cache
from granite_kernels.model.model import GraniteForCausalLM
from granite_kernels.model.request import make_request
from granite_kernels.model.step import State

from granite_kernels.errors import GraniteError

from .attribution import PHASES, Launch, Spent, by_kernel, by_role, passes, pieces
from .roles import Scope, Watch, launches, ranges
from .roof import Roof, measure_roof

STEPS = 4


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of `passes` passes: `wall` seconds as `generate` does it, `profiled` seconds under the profiler, kernels eager."""

    name: str
    passes: int
    wall: float
    profiled: float
    roles: tuple[Spent, ...]
    kernels: tuple[Spent, ...]

    @property
    def outside(self) -> float:
        """Seconds of the profiled time that no role accounts for: a GPU's idle time, on a CPU what lies between operations."""
        return max(self.profiled - sum(role.seconds for role in self.roles), 0.0)


@dataclasses.dataclass(frozen=True)
class Profile:
    roof: Roof
    phases: tuple[Phase, ...]


def profile(
    model: GraniteForCausalLM,
    prompt_tokens: int,
    new_tokens: int,
    trace: Path | None = None,
    advance: Callable[[str], None] = lambda name: None,
) -> Profile:
    """Profile a request of one row. `trace`: where the timeline goes, which Perfetto and chrome://tracing read; `advance` is called STEPS
    times, as the work goes on.

    Raises GraniteError where the request doesn't fit the model's context, or has no decode step.
    """
    if new_tokens < 2:
        raise GraniteError(f"new tokens are {new_tokens}, expected 2 or more: the first one comes out of the prompt, without a decode step")
    ids = some_ids(model, prompt_tokens)
    cuda = model.device.type == "cuda"
    if cuda:
        _warm(model, ids, new_tokens)
    model.generate(ids, max_new_tokens=new_tokens, eos_token_id=[])
    plain = {"prefill": model.last_stats.prompt_seconds, "decode": model.last_stats.generation_seconds}
    advance("as generate does it")
    roof = measure_roof(model.device, model.dtype, quick=True)
    advance("roof")
    told: list[Launch] = []
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        watch = request(model, ids, new_tokens, ranges(cuda), told)
    advance("under the profiler")
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    found = pieces(events, cuda)
    phases = []
    for name in PHASES:
        seconds = passes(events, name)
        roles, kernels = by_role(name, found, watch.calls), by_kernel(name, found, watch.calls, told)
        phases.append(Phase(name, len(seconds), plain[name], sum(seconds), tuple(roles), tuple(kernels)))
    advance("events")
    return Profile(roof, tuple(phases))


def mark(model: GraniteForCausalLM, prompt_tokens: int, new_tokens: int) -> None:
    """The same request within the same ranges, but without a profiler: for another one around the process."""
    ids = some_ids(model, prompt_tokens)
    _warm(model, ids, new_tokens)
    request(model, ids, new_tokens, ranges(model.device.type == "cuda"))


def check(option: str) -> None:
    """Raise GraniteError where there is no GPU, which `option` needs."""
    if not torch.cuda.is_available():
        raise GraniteError(f"{option} needs an NVIDIA GPU, and torch sees none; leave it out: torch's profiler takes the CPU")


def _warm(model: GraniteForCausalLM, ids: torch.Tensor, new_tokens: int) -> None:
    """Kernels are compiled and the step is captured."""
    model.generate(ids, max_new_tokens=new_tokens, eos_token_id=[])


@torch.no_grad()
def request(model: GraniteForCausalLM, ids: torch.Tensor, new_tokens: int, scope: Scope, told: list[Launch] | None = None) -> Watch:
    """One prefill and new_tokens - 1 steps, eager and watched, within ranges of `scope`; `told`: gets what Triton's launches say."""
    config, device, cuda = model.config, model.device, model.device.type == "cuda"
    need = ids.shape[1] + new_tokens
    asked = make_request(config, device, ids, max_new_tokens=new_tokens, limit=model.max_context)
    cache = Cache.allocate(config, 1, need, dtype=model.dtype, device=device)
    state = State.allocate(1, new_tokens, config.vocab_size, device)
    watch = Watch(config, cache, scope)
    engine = model._engine(need)
    engine = dataclasses.replace(engine, ops=watch.wrap(engine.ops))
    step = generation.eager_step(engine, state, cache)

    def seen(metadata: dict[str, Any]) -> None:
        if told is not None:
            told.append(Launch(watch.phase, watch.role, metadata["name"], metadata.get("bytes", 0), metadata.get("flops", 0)))

    with launches(seen, cuda and told is not None):
        with watch.during("prefill", "prefill"), _finished(cuda):
            generation.prefill(engine, asked, cache, state)
        for number in range(new_tokens - 1):
            with watch.during("decode", f"decode {number}"), _finished(cuda):
                step()
            cache.length += 1
    return watch


def some_ids(model: GraniteForCausalLM, tokens: int) -> torch.Tensor:
    """A random prompt, int64 [1, tokens]."""
    return torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _finished(cuda: bool) -> Iterator[None]:
    """Leaves when the device has done what was launched within."""
    yield
    if cuda:
        torch.cuda.synchronize()
