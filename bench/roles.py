"""Operations that are watched: an Ops whose callables name what they do to the profiler and count what it should cost.

A backend is a value, so to profile a model is to run it on another one. Each call runs within a range called by its role; roles are the
operations' names, but that linear_add is "o" behind attention and "down" behind an MLP. Ranges "layer 0", "layer 1", ... lie around the
operations of a layer, and the same ranges go to NVTX where there is a GPU, for Nsight.

    bytes   weights that the call reads (of experts: as many as its tokens meet on average), activations in and out, and of the cache the
            slots that it reads or writes
    flops   2 * tokens * weights of the matrix; of attention 4 * head_dim a head, query and slot seen
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from granite_kernels.model.cache import Cache
from granite_kernels.model.config import GraniteConfig
from torch import Tensor

from granite_kernels.ops import FILES, Op, Ops
from granite_kernels.weight import Weight

# which arguments a call reads whole, beside weights and cache
READ = {
    "embed": (),
    "norm_qkv_rope_append": (0, 1),
    "attention": (0,),
    "attention_decode": (0,),
    "linear_add": (0, 2),
    "norm_gate_up_swiglu": (0, 1),
    "norm_route": (0, 1, 2),
    "experts_gate_up_swiglu": (0,),
    "experts_down_add": (0, 3, 4),
    "norm_logits": (0, 1),
    "sample": (0,),
    "sample_step": (0,),
}
Scope = Callable[[str], AbstractContextManager[Any]]
ROLES = (*(name for name in FILES if name != "linear_add"), "o", "down")
FIRST_OF_A_LAYER, LAST = "norm_qkv_rope_append", "norm_logits"


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a role: what it should move and compute."""

    phase: str
    role: str
    nbytes: int
    flops: int


class Watch:
    """Wraps operations for one run over `cache`; `calls` lists what they were called for. `scope` opens a range of a name."""

    def __init__(self, config: GraniteConfig, cache: Cache, scope: Scope) -> None:
        self.config, self.cache, self.scope = config, cache, scope
        self.calls: list[Call] = []
        self.phase = self.role = ""
        self._layer = contextlib.ExitStack()
        self._number = 0

    def wrap(self, ops: Ops) -> Ops:
        """`ops` with every callable watched; the choices stay."""
        watched: dict[str, Any] = {name: self._watched(name, getattr(ops, name)) for name in FILES}
        return dataclasses.replace(ops, **watched)

    @contextlib.contextmanager
    def during(self, phase: str, label: str) -> Iterator[None]:
        """A range called `label` around one pass of `phase`."""
        self.phase = phase
        with self.scope(label):
            try:
                yield
            finally:
                self._layer.close()

    def _watched(self, name: str, op: Op) -> Op:
        def call(*args: Any, **keywords: Any) -> Any:
            self._enter_layer(name)
            self.role = self._role(name)
            with self.scope(self.role):
                out = op(*args, **keywords)
            self.calls.append(Call(self.phase, self.role, *self._cost(name, args, out)))
            return out

        return call

    def _role(self, name: str) -> str:
        if name != "linear_add":
            return name
        return "o" if self.role.startswith("attention") else "down"

    def _enter_layer(self, name: str) -> None:
        if name == "embed":
            self._number = 0
        if name in ("embed", FIRST_OF_A_LAYER, LAST):
            self._layer.close()
        if name == FIRST_OF_A_LAYER:
            self._layer.enter_context(self.scope(f"layer {self._number}"))
            self._number += 1

    def _cost(self, name: str, args: tuple[Any, ...], out: Any) -> tuple[int, int]:
        given = [args[index] for index in READ[name]]
        results = out if isinstance(out, tuple) else (out,)
        nbytes = sum(t.numel() * t.element_size() for t in (*given, *results) if isinstance(t, Tensor))
        flops = 0
        for weight in (value for value in args if isinstance(value, Weight)):
            read, multiplied = self._shares(name, args)
            nbytes += int(weight.nbytes * read)
            flops += int(2 * weight.numel * multiplied)
        slot = 2 * self.cache.k.shape[2] * self.cache.k.shape[4]  # values of k and v a row
        if name == FIRST_OF_A_LAYER:
            nbytes += args[0].shape[:-1].numel() * slot * self.cache.k.element_size()
        if name.startswith("attention"):
            batch, tokens, heads, head_dim = args[0].shape
            past = self.cache.length
            nbytes += batch * (past + tokens) * slot * self.cache.k.element_size()
            flops = 4 * batch * heads * head_dim * (tokens * past + tokens * (tokens + 1) // 2)
        return nbytes, flops

    def _shares(self, name: str, args: tuple[Any, ...]) -> tuple[float, float]:
        """Of the call's weight, the share that is read, and how often a value of it is multiplied."""
        tokens = args[0].numel() if name == "embed" else args[0].shape[:2].numel()
        if name == "embed":
            return min(tokens / args[1].shape[0], 1.0), 0.0
        if name.startswith("experts"):
            share = self.config.num_experts_per_tok / self.config.num_local_experts
            return 1 - (1 - share) ** tokens, tokens * share
        return 1.0, float(tokens)


def ranges(cuda: bool) -> Scope:
    """Ranges of torch's profiler, and of NVTX on a GPU."""

    @contextlib.contextmanager
    def scope(name: str) -> Iterator[None]:
        with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if cuda else contextlib.nullcontext():
            yield

    return scope


@contextlib.contextmanager
def launches(seen: Callable[[dict[str, Any]], None], cuda: bool) -> Iterator[None]:
    """Hands the `launch_metadata` of every Triton launch within to `seen`. Replays of a graph launch nothing, so they aren't seen."""
    if not cuda:
        yield
        return
    from triton import knobs

    def hook(metadata: Any) -> None:
        seen(metadata.get())

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
