"""Races and missing barriers in an interpreted launch, found by vector clocks.

Two programs that touch the same element, one of them writing, race unless an atomic orders them: a release (by a program
that then counts up a ticket) seen by an acquire. Inside a program, other threads see what it stored only after
`tl.debug_barrier()`; that holds for its own loads and for the atomic that publishes its stores.

The interpreter runs one program after the other, so the order of accesses that it happens to see proves nothing; the
clocks do. Granularity is the element of the tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Literal

import numpy as np

Access = Literal["read", "write", "atomic"]
Report = Callable[[str, str], None]  # kind, message


class Shadow:
    """Who touched each element last, and when: -1 where nobody did."""

    def __init__(self, name: str, elements: int) -> None:
        self.name = name
        self.writer = np.full(elements, -1, np.int32)
        self.written = np.full(elements, -1, np.int32)
        self.atomically = np.zeros(elements, bool)
        self.reader = np.full(elements, -1, np.int32)
        self.read = np.full(elements, -1, np.int32)
        self.several_readers = np.zeros(elements, bool)


class Clocks:
    """The happens-before order of one launch. Time counts accesses; it is never reset between programs."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.program = -1
        self.time = 0
        self.seen: defaultdict[int, dict[int, int]] = defaultdict(dict)  # program -> what it knows of others' times
        self.released: dict[int, dict[int, int]] = {}  # address of an atomic -> the knowledge published there
        self.last_barrier: defaultdict[int, int] = defaultdict(int)
        self.last_store: defaultdict[int, int] = defaultdict(int)  # of more than one lane, hence of several threads

    def barrier(self) -> None:
        self.last_barrier[self.program] = self.time

    def access(self, kind: Access, shadow: Shadow, elements: np.ndarray) -> None:
        """`elements`: unique element numbers in the tensor that this access touches."""
        self.time += 1
        self._against_writers(kind, shadow, elements)
        if kind == "read":
            self._against_itself(shadow, elements)
            previous = shadow.reader[elements]
            shadow.several_readers[elements] |= (previous >= 0) & (previous != self.program)
            shadow.reader[elements] = self.program
            shadow.read[elements] = self.time
            return
        self._against_readers(shadow, elements)
        shadow.writer[elements] = self.program
        shadow.written[elements] = self.time
        shadow.atomically[elements] = kind == "atomic"
        if kind == "write" and elements.size > 1:
            self.last_store[self.program] = self.time

    def synchronize(self, addresses: np.ndarray, semantics: str) -> None:
        """An atomic at these addresses: acquire takes what was published there, release publishes."""
        self.time += 1
        known = self.seen[self.program]
        releases = "release" in semantics
        if releases and self.last_store[self.program] > self.last_barrier[self.program]:
            self.report("BARRIER", "a releasing atomic follows stores without tl.debug_barrier() in between")
        for address in map(int, addresses):
            if "acquire" in semantics:
                for other, time in self.released.get(address, {}).items():
                    known[other] = max(known.get(other, -1), time)
            if releases:
                published = self.released.setdefault(address, {})
                published[self.program] = self.time
                for other, time in known.items():
                    published[other] = max(published.get(other, -1), time)

    def _unordered(self, programs: np.ndarray, times: np.ndarray) -> np.ndarray:
        known = self.seen[self.program]
        limits = {int(other): known.get(int(other), -1) for other in np.unique(programs)}
        limits[self.program] = self.time
        if len(limits) == 1:
            return np.zeros(programs.shape, bool)
        return times > np.array([limits[int(other)] for other in programs])

    def _against_writers(self, kind: Access, shadow: Shadow, elements: np.ndarray) -> None:
        writer = shadow.writer[elements]
        both_atomic = shadow.atomically[elements] & (kind == "atomic")
        conflict = (writer >= 0) & (writer != self.program) & ~both_atomic
        if not conflict.any():
            return
        conflict[conflict] = self._unordered(writer[conflict], shadow.written[elements][conflict])
        self._race("read after write" if kind == "read" else "write after write", shadow, elements, writer, conflict)

    def _against_readers(self, shadow: Shadow, elements: np.ndarray) -> None:
        reader, several = shadow.reader[elements], shadow.several_readers[elements]
        conflict = (reader >= 0) & ((reader != self.program) | several)
        if not conflict.any():
            return
        # only the last reader is remembered: where there were several, a program that acquired nothing races with some
        unknown = several[conflict] & (not self.seen[self.program])
        conflict[conflict] = self._unordered(reader[conflict], shadow.read[elements][conflict]) | unknown
        self._race("write after read", shadow, elements, reader, conflict)

    def _race(self, what: str, shadow: Shadow, elements: np.ndarray, others: np.ndarray, conflict: np.ndarray) -> None:
        if conflict.any():
            where = f"'{shadow.name}' element {int(elements[conflict][0])}"
            self.report(
                "RACE", f"{what} on {where}: programs {int(others[conflict][0])} and {self.program}, {int(conflict.sum())} elements"
            )

    def _against_itself(self, shadow: Shadow, elements: np.ndarray) -> None:
        if elements.size == 1:
            return  # a scalar is stored and loaded by the same threads
        own = (shadow.writer[elements] == self.program) & ~shadow.atomically[elements]
        stale = own & (shadow.written[elements] > self.last_barrier[self.program])
        if stale.any():
            count = int(stale.sum())
            self.report("BARRIER", f"reads {count} elements of '{shadow.name}' that it stored itself without tl.debug_barrier() in between")
