"""From a traced sample of programs to the whole grid, exactly or not at all.

The unit of a sample is a program or, where programs meet at a ticket, those that share one. First and last units,
neighbours and others are traced along each axis; an argument of the launch then counts up in two ways:

- every traced unit reads the same sectors of it: so do all units, and the sectors are counted once;
- no two traced units share a sector, and all but the last read equally many: so do all units, and the count is that of one
  times the units but one, plus the last's.

Anything else raises NotUniformError and the launch is traced in full, but for arguments that hardly count (tickets, lengths, the
rotary table, what a step appends): of those a bound is taken, as if no unit shared a sector with another, and units between two of
the sample did as much as the busier one. A bound may be SMALL bytes or SHARE of what the launch streams. What is stored is counted
in bytes, since programs that store small pieces share sectors without storing the same.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from .requested import SECTOR, Argument, Launch, Selection

SMALL = 4096
SHARE = 0.02
DOUBLING = [0, 1, 2, 4, 8, 16, 32]  # positions along x that tell how many neighbours share a ticket
SPREAD = 9


class NotUniformError(ValueError):
    """The sample says nothing exact about the whole."""


@dataclasses.dataclass(frozen=True)
class ArgumentTraffic:
    """Bytes of one argument: its size; distinct sectors read and written; sectors that go to the SMs, once for each program
    that asks; lanes of all loads, and of those marked evict_first. `programs_per_sector`: the most that read one sector."""

    name: str
    bytes: int
    read: int
    written: int
    to_sms: int
    loaded: int
    streamed: int
    programs_per_sector: int


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
    def followed(self) -> int:
        """The bytes that tell how often loops run: those marked evict_first or, where none are, of all loads."""
        return self.streamed or sum(argument.loaded for argument in self.arguments)

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


def select(grid: tuple[int, int, int], unit: int = 1) -> Selection | None:
    """A sample of a grid by units of `unit` programs along x; None where it would be most of the grid."""
    units = -(-grid[0] // unit)
    along_x = _picked(units, DOUBLING if unit == 1 else DOUBLING[:2], SPREAD if unit == 1 else 3)
    others = [_picked(extent, DOUBLING[:2], 2) for extent in grid[1:]]
    members = np.minimum(along_x[:, None] * unit + np.arange(unit), grid[0])  # past the end: dropped below
    x, y, z = members[:, None, None, :], others[0][:, None, None], others[1][:, None]
    numbers = np.where(x < grid[0], (x * grid[1] + y) * grid[2] + z, -1).reshape(-1)
    programs = tuple(int(number) for number in numbers if number >= 0)
    return None if 2 * len(programs) > np.prod(grid) else Selection(programs, unit, grid)


def _picked(extent: int, fixed: list[int], spread: int) -> np.ndarray:
    """Positions along an axis: some fixed ones, and some evenly spread from first to last."""
    positions = np.concatenate([fixed, np.linspace(0, extent - 1, min(spread, extent)).round()]).astype(np.int64)
    return np.unique(positions[positions < extent])


def next_unit(launch: Launch) -> int | None:
    """The programs along x that seem to share a ticket, told by a sample of single programs; None where it doesn't tell."""
    selection = launch.selection
    if selection is None or selection.unit != 1 or not launch.tickets:
        return None
    inner = launch.grid[1] * launch.grid[2]
    programs = [program for program in selection.programs if program % inner == 0 and program in launch.tickets]
    tickets = {program // inner: launch.tickets[program] for program in programs}  # a program without work takes none
    apart = [position for position in tickets if tickets[position] != next(iter(tickets.values()))]
    if not apart:
        return launch.grid[0] if launch.grid[0] > 1 else None
    return apart[0] if apart[0] in DOUBLING[2:] else None


def count(launch: Launch) -> Traffic:
    """The traffic of all programs of a traced launch. Raises NotUniformError where a sample doesn't tell."""
    selection = launch.selection
    if selection is None:
        return Traffic(launch.name, launch.grid, launch.programs, launch.programs, launch.flops, tuple(map(_exact, launch.arguments)))
    _check_tickets(launch, selection)
    arguments = tuple(_scaled_up(launch, selection, argument) for argument in launch.arguments)
    flops = launch.flops * launch.programs // len(selection.programs)
    return Traffic(launch.name, launch.grid, launch.programs, len(selection.programs), flops, arguments)


def _check_tickets(launch: Launch, selection: Selection) -> None:
    """Programs that meet must be one unit: equal tickets inside, none shared outside."""
    if not launch.tickets:
        return
    if selection.unit == 1:
        raise NotUniformError(f"{launch.name}: programs meet by atomics")
    by_unit: dict[int, set[int]] = {}
    for program in selection.programs:
        tickets = launch.tickets.get(program)  # a program without work takes none
        if tickets is not None and by_unit.setdefault(selection.unit_of(program), tickets) != tickets:
            raise NotUniformError(f"{launch.name}: a unit of {selection.unit} programs has several tickets")
    if sum(map(len, by_unit.values())) != len(set().union(*by_unit.values())):
        raise NotUniformError(f"{launch.name}: units of {selection.unit} programs share tickets")


def _exact(argument: Argument) -> ArgumentTraffic:
    return ArgumentTraffic(
        name=argument.name,
        bytes=argument.bytes,
        read=argument.read_bytes,
        written=argument.written_bytes,
        to_sms=argument.cache_bytes,
        loaded=argument.loaded.total(),
        streamed=argument.streamed_bytes,
        programs_per_sector=argument.programs_per_sector,
    )


def _scaled_up(launch: Launch, selection: Selection, argument: Argument) -> ArgumentTraffic:
    small = max(SMALL, SHARE * launch.streamed_bytes * launch.programs / len(selection.programs))

    def scaled(counter: Counter[int], size: int = 1) -> int:
        """The sum over all units of what the traced ones count, in pieces of `size` bytes."""
        counts = [counter.get(unit, 0) for unit in selection.units]
        *most, last = counts
        if len(set(most)) == 1:
            return most[0] * (selection.all_units - 1) + last
        steps = zip(selection.units, selection.units[1:], counts, counts[1:], strict=False)
        bound = sum((after - before) * max(pair) for before, after, *pair in steps) + last
        if bound * size > small or launch.grid[1:] != (1, 1):
            raise NotUniformError(f"{launch.name}: programs do unequal work on '{argument.name}'")
        return bound

    reads = argument.by_unit
    assert reads is not None
    room = (argument.high - 1) // SECTOR * SECTOR + SECTOR - argument.low // SECTOR * SECTOR  # of all sectors it reaches into
    touched = reads.units[reads.units > 0]
    readers = argument.programs_per_sector
    if touched.size and touched.min() == len(selection.units):
        read, readers = touched.size * SECTOR, readers * selection.all_units // len(selection.units)
    else:
        read = min(scaled(reads.sectors, SECTOR) * SECTOR, room)
        if touched.max(initial=0) > 1:
            readers = launch.programs  # a bound, as `read` is
            if read > small or argument.streamed_bytes:
                raise NotUniformError(f"{launch.name}: some programs share sectors of '{argument.name}' and others don't")
    return ArgumentTraffic(
        name=argument.name,
        bytes=argument.bytes,
        read=read,
        written=min(-(-scaled(argument.stored) // SECTOR) * SECTOR, room),
        to_sms=scaled(argument.fetched, SECTOR) * SECTOR,
        loaded=scaled(argument.loaded),
        streamed=scaled(argument.streamed),
        programs_per_sector=readers,
    )
