"""What a traced launch requested of each of its tensor arguments, in sectors of 32 bytes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from .lines import Lines
from .races import Access, Shadow

SECTOR = 32


@dataclasses.dataclass(frozen=True)
class Selection:
    """Programs of a grid to run, by number, unit after unit. A unit is `unit` programs that follow each other along x."""

    programs: tuple[int, ...]
    unit: int
    grid: tuple[int, int, int]

    def unit_of(self, program: int) -> int:
        inner = self.grid[1] * self.grid[2]
        return program // inner // self.unit * inner + program % inner

    @property
    def units(self) -> tuple[int, ...]:
        """The units of the selected programs, in order."""
        return tuple(dict.fromkeys(map(self.unit_of, self.programs)))

    @property
    def all_units(self) -> int:
        """Units in the whole grid; the last along x may be smaller."""
        return -(-self.grid[0] // self.unit) * self.grid[1] * self.grid[2]


class Argument:
    """One tensor argument of a launch (several, where they share memory) and what was requested of it."""

    def __init__(self, name: str, low: int, high: int, item: int, race: bool) -> None:
        self.name, self.low, self.high, self.item = name, low, high, item
        self.first_sector = low // SECTOR
        sectors = (high - 1) // SECTOR - self.first_sector + 1
        self.readers = np.zeros(sectors, np.int32)  # programs that requested the sector
        self.writers = np.zeros(sectors, np.int32)
        self.last_reader = np.full(sectors, -1, np.int32)
        self.last_writer = np.full(sectors, -1, np.int32)
        self.requests: Counter[Access] = Counter()  # sectors, summed over operations
        # by unit: a program, or in a sampled trace the programs that share a ticket (sampling.Selection)
        self.fetched: Counter[int] = Counter()  # sectors, once for each program that reads them
        self.loaded: Counter[int] = Counter()  # bytes of all lanes
        self.streamed: Counter[int] = Counter()  # of loads marked evict_first
        self.stored: Counter[int] = Counter()
        self.by_unit: UnitReads | None = None
        self.shadow = Shadow(name, (high - low) // item + 1) if race else None

    def __repr__(self) -> str:
        traffic = f"read {self.read_bytes}, written {self.written_bytes}, {self.programs_per_sector} programs a sector"
        return f"<{self.name}: {self.bytes} B, {traffic}>"

    @property
    def bytes(self) -> int:
        """Size of the tensor's memory."""
        return self.high - self.low

    @property
    def read_bytes(self) -> int:
        """Bytes of the distinct sectors that were loaded."""
        return int((self.readers > 0).sum()) * SECTOR

    @property
    def written_bytes(self) -> int:
        return int((self.writers > 0).sum()) * SECTOR

    @property
    def cache_bytes(self) -> int:
        """Bytes that go from the second-level cache to the SMs: each sector once for each program that reads it."""
        return int(self.readers.sum(dtype=np.int64)) * SECTOR

    @property
    def streamed_bytes(self) -> int:
        """Bytes of loads marked evict_first, which the project gives to weights and cache."""
        return self.streamed.total()

    @property
    def programs_per_sector(self) -> int:
        """The most programs that request one and the same sector."""
        return int(self.readers.max(initial=0))

    def touch(self, kind: Access, addresses: np.ndarray, size: int, program: int, unit: int, streamed: bool) -> None:
        sectors = np.unique((addresses // np.uint64(SECTOR)).astype(np.int64) - self.first_sector)
        crossing = addresses[addresses % np.uint64(SECTOR) > SECTOR - size]  # elements not aligned to their size
        if crossing.size:
            sectors = np.union1d(sectors, (crossing // np.uint64(SECTOR)).astype(np.int64) + 1 - self.first_sector)
        moved = addresses.size * size
        self.requests[kind] += sectors.size
        self.streamed[unit] += moved if streamed else 0
        if kind != "write":
            self.loaded[unit] += moved
            self.fetched[unit] += _note(sectors, program, self.last_reader, self.readers)
            if self.by_unit is not None:
                self.by_unit.sectors[unit] += _note(sectors, unit, self.by_unit.last, self.by_unit.units)
        if kind != "read":
            self.stored[unit] += moved
            _note(sectors, program, self.last_writer, self.writers)


class UnitReads:
    """How many units read each sector of an argument, and how many sectors each unit reads."""

    def __init__(self, sectors: int) -> None:
        self.units = np.zeros(sectors, np.int32)
        self.last = np.full(sectors, -1, np.int32)
        self.sectors: Counter[int] = Counter()


def _note(sectors: np.ndarray, who: int, last: np.ndarray, count: np.ndarray) -> int:
    """Note the sectors as touched by a program or unit; how many it hadn't touched before."""
    new = sectors[last[sectors] != who]
    count[new] += 1
    last[new] = who
    return new.size


@dataclasses.dataclass
class Launch:
    """One launch: its grid, its arguments in memory order, its problems; `key` tells it from launches that do other work."""

    name: str
    arguments: list[Argument]
    grid: tuple[int, int, int] = (0, 0, 0)
    key: str = ""
    selection: Selection | None = None  # what ran, where not all programs did
    problems: list[str] = dataclasses.field(default_factory=list)
    flops: int = 0  # of tl.dot
    lines: Lines | None = None  # where they were asked for
    tickets: dict[int, set[int]] = dataclasses.field(default_factory=dict)  # program -> addresses of its atomics
    line_bytes: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)  # loads by (file, line), all programs

    def __getitem__(self, name: str) -> Argument:
        """The argument of this name; `planes.0` is the first of a tuple. Arguments in shared memory answer to each name."""
        for argument in self.arguments:
            if name in argument.name.split("|"):
                return argument
        raise KeyError(f"{name}; there are {', '.join(argument.name for argument in self.arguments)}")

    @property
    def programs(self) -> int:
        return int(np.prod(self.grid))

    @property
    def read_bytes(self) -> int:
        return sum(argument.read_bytes for argument in self.arguments)

    @property
    def written_bytes(self) -> int:
        return sum(argument.written_bytes for argument in self.arguments)

    @property
    def cache_bytes(self) -> int:
        return sum(argument.cache_bytes for argument in self.arguments)

    @property
    def streamed_bytes(self) -> int:
        return sum(argument.streamed_bytes for argument in self.arguments)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, tuple):
        for position, part in enumerate(value):
            yield from _tensors(f"{name}.{position}", part)
    elif isinstance(value, TensorDescriptor | TensorWrapper):
        yield from _tensors(name, value.base)
    elif isinstance(value, torch.Tensor) and value.numel():
        yield name, value


def gather(values: list[tuple[str, Any]], race: bool) -> list[Argument]:
    """Tensor arguments by address; those that overlap in memory (views of one buffer) become one."""
    spans: list[list[Any]] = []
    named = [pair for name, value in values for pair in _tensors(name, value)]
    for name, tensor in sorted(named, key=lambda pair: pair[1].data_ptr()):
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        low, item = tensor.data_ptr(), tensor.element_size()
        high = low + (reach + 1) * item
        if spans and low < spans[-1][2]:
            previous = spans[-1]
            spans[-1] = [f"{previous[0]}|{name}", previous[1], max(previous[2], high), min(previous[3], item)]
        else:
            spans.append([name, low, high, item])
    return [Argument(name, low, high, item, race) for name, low, high, item in spans]
