"""The two halves of an examination, each for a process of its own: what is traced and what is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .child import load_entry

FEW = 32  # programs of launches that always run, since what they compute may choose what others read (a router)
ZEROED = {"empty": torch.zeros, "empty_like": torch.zeros_like}


Bytes = dict[str, int] | list[int]  # by kernel name, or one for each launch in order
Shares = list[tuple[str, int, float]]  # of the programs that run a line; see `lines`


def compile_stage(
    entry: str,
    args: Sequence[Any],
    archs: Sequence[int],
    streamed: Sequence[str],
    sent: Bytes,
    dram: Bytes,
    shares: Sequence[Shares] = (),
) -> list[Any]:
    """Metrics of every launch of `entry(*args)`, architecture by architecture; see `child.compiled`. `shares`: of each launch."""
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
            run_by = shares[position] if position < len(shares) else []
            key = f"{launch.hash} {launch.grid} {launch.arguments} {streamed_bytes} {dram_bytes}"
            if key not in known:
                known[key] = to_json(measure(launch, streamed, streamed_bytes, dram_bytes, run_by))
            records.append({**known[key], "new": launch.new, "site": launch.site})
    return records


def compile_step(
    entry: str, one: Sequence[Any], two: Sequence[Any], arch: int, streamed: list[int], shares: Sequence[Shares]
) -> tuple[list[Any], list[tuple[str, tuple[int, int, int]]]]:
    """`compile_stage` of a step of one layer, whose streamed bytes and shares are given; names and grids of a step of two."""
    from .capture import capture

    measured = compile_stage(entry, one, [arch], (), streamed, {}, shares)
    with capture(arch) as launches:
        load_entry(entry)(*two)
    return measured, [(launch.name, launch.grid) for launch in launches]


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


def trace_stage(entry: str, args: Sequence[Any], known: Sequence[str]) -> list[dict[str, Any]]:
    """Traffic of every launch of `entry(*args)`: records of `key`, `traffic` (`sampling.Traffic`; None where the key is known) and
    `shares`, of the programs that ran a line (`lines`).

    Large grids are sampled and counted up exactly (`sampling`). Where that is refused, another pass samples by the programs
    that share a ticket, or runs all; a launch whose traffic is known, from an earlier pass or to the caller, isn't run again.
    """
    from . import interpreter, sampling
    from .requested import Launch, Selection
    from .traffic import trace

    interpreter.install()
    function = load_entry(entry)
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(known)
    units: dict[str, int | None] = {}  # None: all programs

    def select(launch: Launch) -> Selection | None:
        if launch.key in found and launch.programs > FEW:
            return Selection((), 1, launch.grid)
        unit = units.get(launch.key, 1)
        return None if unit is None else sampling.select(launch.grid, unit)

    while True:
        with _zeroed_scratch(), trace(race=False, select=select, lines=True) as traced:
            function(*args)
        missing = [launch for launch in traced.launches if launch.key not in found]
        for launch in missing:
            try:
                traffic = dataclasses.asdict(sampling.count(launch))
                found[launch.key] = {"traffic": traffic, "shares": launch.lines.shares() if launch.lines is not None else []}
            except sampling.NotUniformError:
                units[launch.key] = sampling.next_unit(launch)
        if all(launch.key in found for launch in traced.launches):
            return [{"key": launch.key, **(found[launch.key] or {"traffic": None, "shares": []})} for launch in traced.launches]
