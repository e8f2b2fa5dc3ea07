"""Whether the kernels compile and run here: one layer's worth of a model, every operation on its own, failures caught."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

from granite_kernels.launch import DECODE_TOKENS
from granite_kernels.ops import FILES, Op, Ops

from . import generate as generation
from .cache import Cache
from .model import GraniteForCausalLM
from .request import make_request
from .step import State


@dataclasses.dataclass(frozen=True)
class Tried:
    """A role's kernels: seconds of all calls, most of which is compiling where nothing was cached, and what went wrong."""

    role: str
    seconds: float
    error: str | None = None


def trial(model: GraniteForCausalLM) -> list[Tried]:
    """Run a prompt and a decode step on `model`'s operations; a row for each role whose kernel is Triton's, as they are called first.

    Where a kernel fails, the reference takes its place, so that the others are tried all the same.
    """
    prompt, found = DECODE_TOKENS + 1, dict[str, Tried]()
    engine = model._engine(prompt + 2)
    engine = dataclasses.replace(engine, ops=_caught(engine.ops, found, lambda: _finish(model.device)))
    request = make_request(model.config, model.device, torch.zeros(1, prompt, dtype=torch.int64), max_new_tokens=2, limit=prompt + 2)
    cache = Cache.allocate(model.config, 1, prompt + 2, dtype=model.dtype, device=model.device)
    state = State.allocate(1, 2, model.config.vocab_size, model.device)
    with torch.no_grad():
        generation.prefill(engine, request, cache, state)
        generation.eager_step(engine, state, cache)()
    return list(found.values())


def _caught(ops: Ops, found: dict[str, Tried], finish: Callable[[], None]) -> Ops:
    """`ops` whose kernels keep a row in `found`."""

    def caught(role: str, op: Op) -> Op:
        reference = getattr(importlib.import_module(f"granite_kernels.reference.{FILES[role]}"), role)

        def call(*args: Any, **keywords: Any) -> Any:
            if role in found and found[role].error is not None:
                return reference(*args, **keywords)
            begun, wrong = time.perf_counter(), None
            try:
                out = op(*args, **keywords)
                finish()
            except Exception as error:  # whatever a compiler, a driver or a launch may raise: that is the question
                wrong = f"{type(error).__name__}: {error}"
                out = reference(*args, **keywords)
            before = found[role].seconds if role in found else 0.0
            found[role] = Tried(role, before + time.perf_counter() - begun, wrong)
            return out

        return call

    active = [choice.role for choice in ops.choices if choice.active]
    replaced: dict[str, Any] = {role: caught(role, getattr(ops, role)) for role in active}
    return dataclasses.replace(ops, **replaced)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
