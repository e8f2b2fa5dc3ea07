"""`granite-kernels bench MODEL`: every implementation in a process of its own, within a time, as rows.

A process apart means that memory is its own, that start-up is a start, and that one that dies or takes too long costs nobody else.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from granite_kernels.model.config import GraniteConfig

from .child import stream
from .end_to_end import ENGINES, Test, plan
from .engines import STATIC, TRANSFORMERS
from .harness import OURS
from .others import as_lists, llama_bench, modelled  # noqa: F401  (`modelled` is called by name, in a child)
from .roof import measure_roof
from .rows import LEFT_OUT, Row

NEEDS_A_GPU = "needs a GPU: Triton's kernels, the captured step, each packed format's speed, memory of the device, energy"
GRACE = 10  # seconds a process may take beyond its share


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure. Empty: chosen for the device."""

    model: str
    prompts: tuple[int, ...] = ()
    generated: int | None = None
    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    formats: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ENGINES
    dtype: str = "auto"
    device: str | None = None
    backend: str = "auto"
    repeats: int | None = None
    minutes: float | None = None
    quick: bool = False
    starts: bool = True

    def filled(self, on_gpu: bool) -> Plan:
        """With a choice for whatever was left open: on a CPU what ends within five minutes, quick within one."""
        if self.quick:
            choice: dict[str, Any] = dict(
                prompts=(128,), generated=32 if on_gpu else 8, contexts=(0,), batches=(1,), repeats=2, minutes=0.6
            )
        elif on_gpu:
            choice = dict(
                prompts=(512, 2048), generated=128, contexts=(0, 1024, 16384, 131072), batches=(1, 4, 8, 16), repeats=5, minutes=9
            )
        else:
            choice = dict(prompts=(512,), generated=16, contexts=(0, 1024, 16384, 131072), batches=(1, 4), repeats=3, minutes=4)
        choice["formats"] = ("", "q8_0", "q6_k", "q4_k_m", "int8", "int4") if on_gpu and not self.quick else ("",)
        if self.quick:
            choice["implementations"] = tuple(name for name in self.implementations if name != STATIC)
        given = {name: value for name, value in vars(self).items() if value not in ((), None) and name != "implementations"}
        return dataclasses.replace(self, **{**choice, **given})

    @property
    def label(self) -> str:
        """The model's name in the rows: of a path the last part."""
        return Path(self.model).name if os.sep in self.model and Path(self.model).exists() else self.model

    @property
    def preset(self) -> str:
        """The preset whose decode step stands for the model where it is examined without a GPU."""
        return self.model.removeprefix("random:") if self.model.startswith("random:") else "3.1-2b"


def run(wanted: Plan) -> Iterator[Row]:
    """Rows as they are measured. Raises GraniteError for a model or device that isn't there, before anything is measured."""
    from granite_kernels.model.loading import resolve_device
    from granite_kernels.model.sources import resolve

    device = resolve_device(wanted.device)
    on_gpu = device.type == "cuda"
    source = resolve(wanted.model)
    look_at(source)
    given = wanted.filled(on_gpu)
    tests = plan(given.prompts, given.generated or 1, given.contexts, given.batches)
    deadline = time.time() + 60 * (given.minutes or 1)
    roof = measure_roof(device, torch.bfloat16 if on_gpu else torch.float32, quick=given.quick)
    yield from roof.rows(torch.bfloat16 if on_gpu else torch.float32)
    jobs = [(name, form) for name in given.implementations for form in (given.formats if name == OURS else given.formats[:1])]
    starting = given.starts and not given.quick
    looking = not on_gpu and not given.quick
    shares = [2.0 if name == OURS else 1.0 for name, _ in jobs]
    rest = (0.7 if starting else 0.0) + (1.0 if looking else 0.0)
    for index, (name, form) in enumerate(jobs):
        left = deadline - time.time()
        share = left * shares[index] / (sum(shares[index:]) + rest)
        yield from _speed(given, name, form, tests, roof.bandwidth, str(device), max(share, 1))
    yield from llama_bench(source, given.label, tests, given.repeats or 1, on_gpu=on_gpu, threads=torch.get_num_threads(), until=deadline)
    if starting:
        yield from _starts(given, str(device), deadline - (40 if looking else 0))
    if looking:
        failed = {"kind": "modelled", "model": given.preset, "format": "none", "card": "", "launch": ""}
        arguments = dict(preset=given.preset, quantization="none", arch=90)
        yield from stream(f"{__package__}.others:modelled", arguments, timeout=max(deadline + GRACE - time.time(), 1), failed=failed)
    if not on_gpu:
        about = {
            "kind": "speed",
            "model": given.label,
            "implementation": OURS,
            "format": "Triton",
            "test": "all",
            "batch": None,
            "context": 0,
        }
        yield about | {"status": LEFT_OUT, "note": NEEDS_A_GPU}


def look_at(source: str | Path) -> None:
    """Raise GraniteError where there is no such model, before any process is started for it."""
    from granite_kernels.model.checkpoint import open_checkpoint
    from granite_kernels.model.sources import RANDOM

    if isinstance(source, str) and source.startswith(RANDOM):
        GraniteConfig.preset(source.removeprefix(RANDOM))
        return
    with open_checkpoint(source):
        pass


def _options(given: Plan, form: str, device: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(dtype=given.dtype, device=device, backend=given.backend)
    if given.model.startswith("random:") and given.dtype == "auto" and device == "cpu":
        options["dtype"] = "float32"  # 16 bits are slow on most CPUs
    return options | ({"quantization": form} if form else {})


def _speed(given: Plan, name: str, form: str, tests: Sequence[Test], bandwidth: float, device: str, seconds: float) -> Iterator[Row]:
    if name == STATIC:  # each shape compiles: what compiles first, and for one sequence only
        tests = sorted((test for test in tests if test.batch == 1), key=lambda test: (test.new == 1, test.work))
    arguments = dict(
        implementation=name,
        model=given.model,
        label=given.label,
        options=_options(given, form, device),
        tests=as_lists(tests),
        repeats=given.repeats,
        bandwidth=bandwidth,
        until=time.time() + seconds,
    )
    failed = {"kind": "speed", "model": given.label, "implementation": name, "format": form or "as stored", "test": "all", "batch": None}
    yield from stream(f"{__package__}.end_to_end:run", arguments, timeout=seconds + GRACE, failed=failed | {"context": 0})


def _starts(given: Plan, device: str, deadline: float) -> Iterator[Row]:
    """Start-up with empty caches, and again with what that left in them. Nothing is compiled by an eager engine."""
    for name in given.implementations:
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            compiles = name == STATIC or (name != TRANSFORMERS and device != "cpu")
            for state in ("cold", "warm") if compiles else ("none needed",):
                form = given.formats[0]
                failed = {"kind": "startup", "model": given.label, "implementation": name, "format": form or "as stored", "cache": state}
                left = deadline - time.time()
                if left < 5:
                    yield failed | {"status": LEFT_OUT, "note": "the time of this run is up; --minutes gives more"}
                    continue
                options = _options(given, form, device)
                arguments = dict(implementation=name, model=given.model, label=given.label, options=options, cache=state, begun=time.time())
                yield from stream(f"{__package__}.startup:run", arguments, timeout=left, failed=failed, environment=caches)
