"""Whose time it was: events of torch's profiler, by phase, role and kernel.

A kernel counts for the innermost role whose call launched it. On a CPU the kernels are torch's operations, each with its own time, and
what a role spends outside of them is its Python.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .roles import ROLES, Call

PHASES = ("prefill", "decode")
PYTHON = "(Python and dispatch)"


@dataclasses.dataclass(frozen=True)
class Piece:
    """One kernel that ran for a role."""

    phase: str
    role: str
    kernel: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a Triton launch said that it costs."""

    phase: str
    role: str
    kernel: str
    nbytes: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of all calls of a role or, where `kernel` is given, of a kernel within it; bytes and flops where they were counted."""

    role: str
    calls: int
    seconds: float
    nbytes: int = 0
    flops: int = 0
    kernel: str = ""


def pieces(events: Iterable[Any], cuda: bool) -> list[Piece]:
    """The kernels below every range that is called like a role."""
    found = []
    for event in events:
        if _is_range(event) and event.name in ROLES:
            phase = next(name for name in map(_phase, _ancestors(event)) if name in PHASES)
            found += [Piece(phase, event.name, kernel, 1e-6 * micros) for kernel, micros in _kernels(event, cuda)]
    return found


def passes(events: Iterable[Any], phase: str) -> list[float]:
    """Seconds of each pass of a phase."""
    return [1e-6 * event.cpu_time_total for event in events if _is_range(event) and _phase(event) == phase]


def by_role(phase: str, found: Sequence[Piece], calls: Sequence[Call]) -> list[Spent]:
    """A row a role, in the order in which they first ran."""
    seconds: Counter[str] = Counter()
    for piece in found:
        if piece.phase == phase:
            seconds[piece.role] += piece.seconds  # type: ignore[assignment]  # a Counter adds floats just as well
    rows = []
    for role in dict.fromkeys(call.role for call in calls if call.phase == phase):
        own = [call for call in calls if (call.phase, call.role) == (phase, role)]
        rows.append(Spent(role, len(own), seconds[role], sum(call.nbytes for call in own), sum(call.flops for call in own)))
    return rows


def by_kernel(phase: str, found: Sequence[Piece], calls: Sequence[Call], launches: Sequence[Launch]) -> list[Spent]:
    """A row a kernel and role, the slowest first.

    A kernel that alone does a role's work has the role's bytes and flops; else they are those that its launches told, if any did.
    """
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for piece in found:
        if piece.phase == phase:
            groups[piece.role, piece.kernel].append(piece.seconds)
    alone = Counter(role for role, _ in groups)
    rows = []
    for (role, kernel), seconds in groups.items():
        costs: list[tuple[int, int]]
        if alone[role] == 1:
            costs = [(call.nbytes, call.flops) for call in calls if (call.phase, call.role) == (phase, role)]
        else:
            told = (launch for launch in launches if (launch.phase, launch.role, launch.kernel) == (phase, role, kernel))
            costs = [(launch.nbytes, launch.flops) for launch in told]
        rows.append(Spent(role, len(seconds), sum(seconds), sum(b for b, _ in costs), sum(f for _, f in costs), kernel))
    return sorted(rows, key=lambda row: -row.seconds)


def _is_range(event: Any) -> bool:
    return bool(event.is_user_annotation) and event.device_type.name == "CPU"


def _phase(event: Any) -> str:
    """ "decode 3" is a pass of the phase "decode"."""
    return str(event.name).split(" ")[0]


def _ancestors(event: Any) -> Iterator[Any]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def _kernels(event: Any, cuda: bool) -> Iterator[tuple[str, float]]:
    """(kernel, microseconds) of everything that was launched or done below an event."""
    if cuda:
        yield from ((kernel.name, kernel.duration) for kernel in event.kernels)
    else:
        yield PYTHON if _is_range(event) else event.name, event.self_cpu_time_total
    for child in event.cpu_children:
        yield from _kernels(child, cuda)
