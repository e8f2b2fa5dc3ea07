"""Memory traffic of interpreted launches: which 32-byte sectors each program requests, and what it should not have touched.

    with trace(order="reverse") as traced:
        rms_norm(x, weight, eps=1e-5)
    assert not traced.problems
    launch = traced.launches[0]
    launch["x_ptr"].read_bytes, launch["x_ptr"].programs_per_sector

DRAM bytes are those of distinct sectors (each comes from DRAM once if the cache holds it until its last use). A sector
that several programs request travels from the second-level cache to an SM that often. Problems are texts that begin with
OOB (an access outside the tensor that the pointer was made from), RACE, BARRIER or DUP (lanes of one store that write
different values to one address).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import triton

from .hooks import SEVERAL, hooked
from .lines import Lines
from .races import Access, Clocks
from .requested import Argument, Launch, Selection, UnitReads, gather

HERE = str(Path(__file__).parent)
TRITON = str(Path(triton.__file__).parent)
Order = Literal["forward", "reverse", "random"]
Select = Callable[[Launch], Selection | None]  # None: all programs


class TraceError(RuntimeError):
    """A problem, raised at once by `trace(strict=True)`."""


class Tracer:
    """The observer behind `trace`. `launches` in order; `problems` of all of them."""

    def __init__(self, race: bool, order: Order, seed: int, strict: bool, select: Select | None, lines: bool = False) -> None:
        if order not in ("forward", "reverse", "random"):
            raise ValueError(f"order is {order!r}; there are forward, reverse, random")
        self.race, self.order, self.strict = race, order, strict
        self.select, self.lines = select, lines
        self.generator = np.random.default_rng(seed)
        self.launches: list[Launch] = []
        self.current: Launch | None = None
        self.number = self.unit = -1
        self._error: TraceError | None = None

    @property
    def problems(self) -> list[str]:
        return [f"{launch.name}: {problem}" for launch in self.launches for problem in launch.problems]

    def begin(self, name: str, arguments: list[tuple[str, Any]]) -> None:
        found = gather(arguments, self.race)
        others = {name: str(getattr(value, "__name__", value)) for name, value in arguments if not hasattr(value, "data_ptr")}
        self.current = Launch(name, found, key=f"{name} {sorted((argument.name, argument.bytes) for argument in found)} {others}")
        self.starts = np.array([argument.low for argument in found], np.uint64)
        self.ends = np.array([argument.high for argument in found], np.uint64)
        self.clocks = Clocks(self.problem)
        self.launches.append(self.current)

    def end(self) -> None:
        if self.current is not None and self.current.lines is not None:
            self.current.lines.stop()
        self.current = None

    def sequence(self, grid: tuple[int, int, int]) -> np.ndarray:
        assert self.current is not None
        self.current.grid = grid
        self.current.key = f"{grid} {self.current.key}"
        chosen = np.arange(self.current.programs)
        if self.select is not None and (selection := self.select(self.current)) is not None:
            self.current.selection = selection
            chosen = np.array(selection.programs, np.int64)
            for argument in self.current.arguments:
                argument.by_unit = UnitReads(argument.readers.size)
        if self.lines and (self.current.selection is None or self.current.selection.unit > 1):
            self.current.lines = Lines()
            self.current.lines.start()
        if self.order == "random":
            return self.generator.permutation(chosen)
        return chosen[::-1] if self.order == "reverse" else chosen

    def program(self, number: int) -> None:
        assert self.current is not None
        if self.current.lines is not None:
            self.current.lines.program_ends()
        self.number = self.clocks.program = number
        self.unit = number if self.current.selection is None else self.current.selection.unit_of(number)

    def problem(self, kind: str, message: str) -> None:
        assert self.current is not None
        file, line = _kernel_line()
        text = f"{kind}: {message}, at {file}:{line} in program {self.number}"
        if len(self.current.problems) < 1000:
            self.current.problems.append(text)
        if self.strict:
            self._error = TraceError(f"{self.current.name}: {text}")
            raise self._error

    def take_error(self) -> TraceError | None:
        """The problem that `strict` raised, once."""
        found, self._error = self._error, None
        return found

    def owner(self, address: int) -> int | None:
        if self.current is None or not len(self.starts):
            return None
        index = int(np.searchsorted(self.starts, np.uint64(address), side="right")) - 1
        return index if index >= 0 and address < self.ends[index] else None

    def access(self, kind: Access, pointers: Any, mask: np.ndarray, values: np.ndarray | None = None, streamed: bool = False) -> None:
        launch = self.current
        if launch is None:
            return
        addresses = pointers.data[mask].astype(np.uint64, copy=False)
        if addresses.size == 0:
            return
        if not launch.arguments:
            return self.problem("OOB", "an access by a kernel without tensor arguments")
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if kind == "read":
            launch.line_bytes[_kernel_line()] += addresses.size * size
        if kind == "atomic":
            launch.tickets.setdefault(self.number, set()).update(map(int, addresses))
        index = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        owner = pointers.attr.get("owner")
        stray = (index < 0) | (addresses + np.uint64(size) > self.ends[np.maximum(index, 0)])
        if owner is not None and owner != SEVERAL:
            stray |= index != owner
        if stray.any():
            self._stray(kind, addresses[stray], index[stray] if owner in (None, SEVERAL) else np.array([owner]))
            addresses, index, values = addresses[~stray], index[~stray], None
        for position in np.unique(index):
            argument = launch.arguments[position]
            inside = addresses[index == position]
            argument.touch(kind, inside, size, self.number, self.unit, streamed)
            if kind == "write" and values is not None and values.size == inside.size:
                self._duplicates(argument, inside, values)
            if argument.shadow is not None:
                first = (inside - np.uint64(argument.low)).astype(np.int64)
                parts = [first // argument.item, (first + size - 1) // argument.item] if size != argument.item else [first // argument.item]
                self.clocks.access(kind, argument.shadow, np.unique(np.concatenate(parts)))

    def _stray(self, kind: Access, addresses: np.ndarray, nearest: np.ndarray) -> None:
        assert self.current is not None
        argument = self.current.arguments[max(int(nearest[0]), 0)]
        offset = int(addresses[0]) - argument.low
        self.problem(
            "OOB", f"{kind} of {addresses.size} lanes, the first {offset:+d} B from the start of '{argument.name}' ({argument.bytes} B)"
        )

    def _duplicates(self, argument: Argument, addresses: np.ndarray, values: np.ndarray) -> None:
        order = np.argsort(addresses, kind="stable")
        addresses, values = addresses[order], values[order]
        same = addresses[1:] == addresses[:-1]
        if (same & (values[1:] != values[:-1]) & ~((values[1:] != values[1:]) & (values[:-1] != values[:-1]))).any():
            self.problem("DUP", f"lanes of one store write different values to one address of '{argument.name}'")

    def synchronize(self, pointers: np.ndarray, mask: np.ndarray, semantics: str) -> None:
        if self.race and self.current is not None:
            semantics = semantics.replace("acq_rel", "acquire_release")
            self.clocks.synchronize(pointers[mask], "" if "relaxed" in semantics else semantics)

    def barrier(self) -> None:
        if self.current is not None:
            self.clocks.barrier()

    def dot(self, flops: int) -> None:
        if self.current is not None:
            self.current.flops += flops


def _kernel_line() -> tuple[str, int]:
    """File name and line of the kernel (or device function) that runs."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((HERE, TRITON)):
        frame = frame.f_back
    return ("?", 0) if frame is None else (Path(frame.f_code.co_filename).name, frame.f_lineno)


@contextmanager
def trace(
    race: bool = True,
    order: Order = "forward",
    *,
    seed: int = 0,
    strict: bool = False,
    select: Select | None = None,
    lines: bool = False,
) -> Iterator[Tracer]:
    """Trace every interpreted launch inside the context (`interpreter.install()` first).

    `order` is the sequence in which the programs of a grid run: a GPU promises none, so a kernel must give the same bits in
    all three. `race` looks for races too; `strict` raises TraceError at the first problem. `select` may
    choose the programs of a launch that run; results are then incomplete: for counting alone, see `sampling`. `lines` notes which
    lines of the kernel they ran, but in samples of single programs, which tell nothing of those that meet.
    """
    tracer = Tracer(race, order, seed, strict, select, lines)
    with hooked(tracer):
        yield tracer
