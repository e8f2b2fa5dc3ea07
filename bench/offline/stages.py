"""The two halves of an examination, each for a process of its own: what is traced and what is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .child import load_entry

SAMPLE = 12  # programs of a large grid that are traced
ZEROED = {"empty": torch.zeros, "empty_like": torch.zeros_like}


Bytes = dict[str, int] | list[int]  # by kernel name, or one for each launch in order


def compile_stage(entry: str, args: Sequence[Any], archs: Sequence[int], streamed: Sequence[str], sent: Bytes, dram: Bytes) -> list[Any]:
    """Metrics of every launch of `entry(*args)`, architecture by architecture; see `child.compiled`."""
    from .capture import capture
    from .metrics import measure, to_json

    function = load_entry(entry)
    known: dict[str, dict[str, Any]] = {}
    records = []
    for arch in archs:
        with capture(arch) as launches:
            function(*args)
        for position, launch in enumerate(launches):
            streamed_bytes, dram_bytes = _lookup(sent, launch.name, position), _lookup(dram, launch.name, position)
            key = f"{launch.hash} {launch.grid} {launch.arguments} {streamed_bytes} {dram_bytes}"
            if key not in known:
                known[key] = to_json(measure(launch, streamed, streamed_bytes, dram_bytes))
            records.append({**known[key], "new": launch.new, "site": launch.site})
    return records


def compile_runs(entry: str, runs: Sequence[Sequence[Any]], arch: int, sent: list[int]) -> list[list[Any]]:
    """`compile_stage` for several argument lists in one process; the streamed bytes are those of the first run's launches."""
    return [compile_stage(entry, args, [arch], (), sent if number == 0 else [], {}) for number, args in enumerate(runs)]


def _lookup(values: Bytes, name: str, position: int) -> int | None:
    if isinstance(values, list):
        return values[position] if position < len(values) else None
    return values.get(name)


@contextmanager
def _zeroed_scratch() -> Iterator[None]:
    """What a sampled launch leaves unwritten is zero and not rubbish: a router that reads it still picks real experts."""
    saved = {name: getattr(torch, name) for name in ZEROED}
    try:
        for name, zeroed in ZEROED.items():
            setattr(torch, name, zeroed)
        yield
    finally:
        for name, function in saved.items():
            setattr(torch, name, function)


def trace_stage(entry: str, args: Sequence[Any], sample: int | None = SAMPLE) -> list[dict[str, Any]]:
    """Traffic of every launch of `entry(*args)`, as `sampling.Traffic` in JSON.

    Large grids are sampled and counted up exactly (`sampling.count`). Kernels that can't be, because their programs differ
    or meet by atomics, are traced whole in a second pass.
    """
    from . import interpreter
    from .sampling import NotUniformError, count
    from .traffic import trace

    interpreter.install()
    function = load_entry(entry)
    whole: set[str] = set()
    while True:
        with _zeroed_scratch(), trace(race=False, sample=sample, whole=whole) as traced:
            function(*args)
        results, refused = [], set()
        for launch in traced.launches:
            try:
                results.append(dataclasses.asdict(count(launch)))
            except NotUniformError:
                refused.add(launch.name)
        if not refused:
            return results
        whole |= refused
