"""`granite-kernels bench MODEL`: every implementation in a process of its own, within a time, as rows.

A process apart means that memory is its own, that start-up is a start, and that one that dies or takes too long costs nobody else. On a
CPU, which others may use meanwhile, implementations that compile nothing take turns request by request, as far as memory goes round.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.room import available, fits
from granite_kernels.model.sources import RANDOM, resolve

from .child import in_turns, stream
from .end_to_end import ENGINES, Test, plan
from .engines import STATIC, TRANSFORMERS
from .harness import OURS
from .others import as_lists, llama_bench, modelled  # noqa: F401  (`modelled` is called by name, in a child)
from .roof import measure_roof
from .rows import LEFT_OUT, Row

NEEDS_A_GPU = "needs a GPU: Triton's kernels, the captured step, each packed format's speed, memory of the device, energy"
LARGE = "a model of this size takes minutes to compile and to start on a CPU; --implementation and --minutes measure it all the same"
ROOM = 0.4  # of the memory that is free, for all that take turns
GRACE = 10  # seconds that a process may take beyond its share at most


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
    done: tuple[tuple[Any, ...], ...] = ()  # keys of rows that aren't measured again

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
            choice = dict(prompts=(32, 512), generated=16, contexts=(0, 1024, 16384, 131072), batches=(1, 4), repeats=3, minutes=4.3)
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
        return self.model.removeprefix(RANDOM) if self.model.startswith(RANDOM) else "3.1-2b"


def run(wanted: Plan) -> Iterator[Row]:
    """Rows as they are measured. Raises GraniteError for a model or device that isn't there, before anything is measured."""
    from granite_kernels.model.loading import resolve_device

    device = resolve_device(wanted.device)
    on_gpu = device.type == "cuda"
    source = resolve(wanted.model)
    look_at(source)
    given = wanted.filled(on_gpu)
    if not on_gpu and wanted.model.startswith(RANDOM) and given.dtype == "auto":  # 16 bits are slow on most CPUs
        given = dataclasses.replace(given, dtype="float32" if has_room(memory_of(source, "float32")) else "bfloat16")
    tests = plan(given.prompts, given.generated or 1, given.contexts, given.batches)
    deadline = time.time() + 60 * (given.minutes or 1)
    roof = measure_roof(device, torch.bfloat16 if on_gpu else torch.float32, quick=given.quick)
    yield from roof.rows(torch.bfloat16 if on_gpu else torch.float32)
    jobs = [(name, form) for name in given.implementations for form in (given.formats if name == OURS else given.formats[:1])]
    need = 0 if on_gpu else memory_of(source, given.dtype)
    large = not on_gpu and not has_room(2 * need)
    starting = given.starts and not given.quick and not large
    looking = not on_gpu and not given.quick
    rest = (0.7 if starting else 0.0) + (1.0 if looking else 0.0)
    if large and wanted.implementations == ENGINES:  # what would leave no time for the others
        jobs = [job for job in jobs if job[0] != STATIC]
        yield _unmeasured(given, STATIC, "") | {"status": LEFT_OUT, "note": LARGE}
    if not on_gpu and not fits(need, device):
        rivals = [job for job in jobs if job[0] != OURS]
        jobs = [job for job in jobs if job[0] == OURS]
        note = f"needs some {need / 1e9:.0f} GB beside ours, {(available(device) or 0) / 1e9:.0f} GB are free"
        yield from ({**_unmeasured(given, name, form), "status": LEFT_OUT, "note": note} for name, form in rivals)
    remaining = {job: [test for test in tests if not _known(given, *job, test)] for job in jobs}
    jobs = [job for job in jobs if remaining[job]]
    groups = [[job] for job in jobs] if on_gpu else together(jobs, need)
    for index, group in enumerate(groups):
        share = (deadline - time.time()) * _weight(group) / (sum(map(_weight, groups[index:])) + rest)
        each, turns = max(share / len(group), 1), len(group) > 1
        speeds = [_speed(given, *job, remaining[job], roof.bandwidth, str(device), each, turns) for job in group]
        yield from in_turns(speeds)
    yield from llama_bench(source, given.label, tests, given.repeats or 1, on_gpu=on_gpu, threads=torch.get_num_threads(), until=deadline)
    if starting:
        yield from _starts(given, str(device), deadline - (40 if looking else 0))
    if looking:
        failed = {"kind": "modelled", "model": given.preset, "format": "none", "card": "", "launch": ""}
        arguments = dict(preset=given.preset, quantization="none", arch=90)
        yield from stream(f"{__package__}.others:modelled", arguments, timeout=max(deadline + GRACE - time.time(), 1), failed=failed)
    if not on_gpu:
        yield _unmeasured(given, OURS, "Triton") | {"status": LEFT_OUT, "note": NEEDS_A_GPU}


def _known(given: Plan, name: str, form: str, test: Test) -> bool:
    """Whether a row of this test is there already."""
    formats = [form] if form else ["bfloat16", "float16", "float32"]
    return any(("speed", given.label, name, format, test.name, test.batch, test.context) in given.done for format in formats)


def _weight(jobs: Sequence[tuple[str, str]]) -> float:
    """Of what time there is, against 1 for one that compiles."""
    return sum(1.0 if name == STATIC else 1.5 for name, _ in jobs)


def together(jobs: Sequence[tuple[str, str]], need: int) -> list[list[tuple[str, str]]]:
    """Which engines take turns on a CPU: those that compile nothing, where all have room at once; one takes `need` bytes."""
    alone = [[job] for job in jobs if job[0] == STATIC]
    alike = [job for job in jobs if job[0] != STATIC]
    return [group for group in (alike, *alone) if group] if has_room(need * len(alike)) else [[job] for job in jobs]


def memory_of(source: str | Path, dtype: str) -> int:
    """Bytes that an engine on a CPU takes at most: in float32 transformers' matrices are copies of ours, which lie transposed."""
    from granite_kernels.model.checkpoint import open_checkpoint

    if isinstance(source, str) and source.startswith(RANDOM):
        config, packed = GraniteConfig.preset(source.removeprefix(RANDOM)), False
    else:
        with open_checkpoint(source) as checkpoint:
            config, packed = checkpoint.config, checkpoint.packed
    wide = dtype == "float32" or (dtype == "auto" and (packed or config.dtype == torch.float32))
    return config.parameters() * (8 if wide else 2)


def has_room(need: int) -> bool:
    free = available(torch.device("cpu"))
    return free is None or need <= ROOM * free


def look_at(source: str | Path) -> None:
    """Raise GraniteError where there is no such model, before any process is started for it."""
    from granite_kernels.model.checkpoint import open_checkpoint

    if isinstance(source, str) and source.startswith(RANDOM):
        GraniteConfig.preset(source.removeprefix(RANDOM))
        return
    with open_checkpoint(source):
        pass


def _options(given: Plan, form: str, device: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(dtype=given.dtype, device=device, backend=given.backend)
    return options | ({"quantization": form} if form else {})


def _speed(
    given: Plan, name: str, form: str, tests: Sequence[Test], bandwidth: float, device: str, seconds: float, turns: bool
) -> Generator[Row, None, None]:
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
        seconds=seconds,
        turns=turns,
    )
    yield from stream(
        f"{__package__}.end_to_end:run", arguments, timeout=seconds + min(GRACE, seconds / 5), failed=_unmeasured(given, name, form)
    )


def _unmeasured(given: Plan, name: str, form: str) -> Row:
    """What a row of an implementation is about that has no figures at all."""
    about = {"kind": "speed", "model": given.label, "implementation": name, "format": form or "as stored"}
    return about | {"test": "all", "batch": None, "context": 0}


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
