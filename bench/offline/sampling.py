"""From a traced sample of programs to the whole grid, exactly or not at all.

When a launch has more programs than were traced (first, last and some between), an argument of it counts up in two ways:

- every traced program reads the same sectors of it: so do all programs, and the sectors are counted once;
- no two traced programs share a sector, and all but the last touch equally many: so do all programs, and the count is that
  of one times the programs but one, plus the last's.

What is stored is counted in bytes, since programs that store small pieces share sectors without storing the same.

Anything else raises NotUniformError, and so do atomics, whose last program does more than the others; the launch is then traced
in full.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from .requested import SECTOR, Argument, Launch


class NotUniformError(ValueError):
    """The sample says nothing exact about the whole."""


@dataclasses.dataclass(frozen=True)
class ArgumentTraffic:
    """Bytes of one argument: its size; distinct sectors read and written; sectors that go to the SMs, once for each program
    that asks; the bytes of loads marked evict_first. `programs_per_sector`: the most programs that read one sector."""

    name: str
    bytes: int
    read: int
    written: int
    to_sms: int
    programs_per_sector: int
    streamed: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One launch. `traced` of `programs` were run; the counts are of all."""

    name: str
    grid: tuple[int, int, int]
    programs: int
    traced: int
    flops: int
    arguments: tuple[ArgumentTraffic, ...]

    @property
    def read(self) -> int:
        return sum(argument.read for argument in self.arguments)

    @property
    def written(self) -> int:
        return sum(argument.written for argument in self.arguments)

    @property
    def dram(self) -> int:
        """Bytes between DRAM and the chip where each distinct sector moves once."""
        return self.read + self.written

    @property
    def streamed(self) -> int:
        return sum(argument.streamed for argument in self.arguments)

    @property
    def reread(self) -> int:
        """Bytes to the SMs of all that isn't streamed: activations, norms, metadata read again and again from the cache."""
        return sum(argument.to_sms for argument in self.arguments if not argument.streamed)

    @property
    def stream_readers(self) -> int:
        """The most programs that read one sector of a streamed argument; 1 is the aim, 0 where nothing is streamed."""
        return max((argument.programs_per_sector for argument in self.arguments if argument.streamed), default=0)


def from_json(record: dict[str, Any]) -> Traffic:
    arguments = tuple(ArgumentTraffic(**argument) for argument in record["arguments"])
    return Traffic(**{**record, "grid": tuple(record["grid"]), "arguments": arguments})


def count(launch: Launch) -> Traffic:
    """The traffic of all programs of a traced launch. Raises NotUniformError where a sample doesn't tell."""
    traced = len(launch.sampled)
    if traced < launch.programs and launch.atomics:
        raise NotUniformError(f"{launch.name}: programs meet by atomics")
    arguments = tuple(_argument(launch, argument) for argument in launch.arguments)
    flops = launch.flops * launch.programs // max(traced, 1)
    return Traffic(launch.name, launch.grid, launch.programs, traced, flops, arguments)


def _argument(launch: Launch, argument: Argument) -> ArgumentTraffic:
    traced = len(launch.sampled)
    if traced == launch.programs:
        read, written = argument.read_bytes, argument.written_bytes
        to_sms, readers, streamed = argument.cache_bytes, argument.programs_per_sector, argument.streamed_bytes
        return ArgumentTraffic(argument.name, argument.bytes, read, written, to_sms, readers, streamed)
    read, shared = _read(launch, argument)
    readers = launch.programs if shared else argument.programs_per_sector
    to_sms = read * launch.programs if shared else read
    stored = _scaled(launch, argument.stored_by_program)
    written = min(-(-stored // SECTOR) * SECTOR, _room(argument))
    streamed = _scaled(launch, argument.streamed_by_program)
    return ArgumentTraffic(argument.name, argument.bytes, read, written, to_sms, readers, streamed)


def _read(launch: Launch, argument: Argument) -> tuple[int, bool]:
    """Bytes of distinct sectors that all programs read, and whether they all read the same."""
    touched = argument.readers[argument.readers > 0]
    if touched.size == 0:
        return 0, False
    if touched.min() == len(launch.sampled):
        return touched.size * SECTOR, True
    if touched.max() > 1:
        raise NotUniformError(f"{launch.name}: some programs share sectors of '{argument.name}' and others don't")
    return min(_scaled(launch, argument.read_by_program) * SECTOR, _room(argument)), False


def _room(argument: Argument) -> int:
    """Bytes of all sectors that the argument reaches into, at most."""
    return -(-argument.bytes // SECTOR) * SECTOR + SECTOR


def _scaled(launch: Launch, by_program: Counter[int]) -> int:
    """The sum over all programs of what the traced ones count."""
    *most, last = (by_program.get(program, 0) for program in launch.sampled)
    if len(set(most)) > 1:
        raise NotUniformError(f"{launch.name}: programs do unequal work")
    return most[0] * (launch.programs - 1) + last
