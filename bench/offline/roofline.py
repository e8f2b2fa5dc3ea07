"""Trace and compiled code of a launch together: instructions a byte, bytes in flight, and a modelled time for each card.

    dram     distinct bytes / bandwidth
    issue    warp instructions of the launch / what the schedulers of the busy SMs issue
    latency  distinct bytes / bytes in flight on the whole card * LATENCY        (Little's law)

The modelled time is the longest of the three. It is a model: clocks are boost clocks, latency is one constant, launch gaps,
caches that keep data between launches and stalls are left out, and nothing has been calibrated. It ranks kernels and marks
regressions; it doesn't predict a measurement.
"""

from __future__ import annotations

import dataclasses

from .cards import Card
from .metrics import Metrics
from .sampling import Traffic

LATENCY = 700e-9  # seconds from the request of a sector to its arrival from DRAM; published measurements give 500 to 900 ns


@dataclasses.dataclass(frozen=True)
class Bound:
    """A launch on a card. Times in seconds; `budget` and `instructions_per_byte` in warp instructions a DRAM byte."""

    card: str
    budget: float
    dram: float
    issue: float
    latency: float
    in_flight_per_sm: int

    @property
    def modelled(self) -> float:
        return max(self.dram, self.issue, self.latency)

    @property
    def by(self) -> str:
        """What the modelled time is bound by: dram, issue or latency."""
        return max(("dram", "issue", "latency"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Examined:
    """One launch of a step, traced and compiled, and how often the whole model makes it in that step."""

    traffic: Traffic
    metrics: Metrics
    times: int
    bounds: tuple[Bound, ...]

    @property
    def instructions_per_byte(self) -> float:
        return (self.metrics.dynamic_instructions or 0) / max(self.traffic.dram, 1)


def bound(traffic: Traffic, metrics: Metrics, card: Card) -> Bound:
    """Where the launch stands on the card. The metrics must carry dynamic counts (`measure` with streamed bytes)."""
    if metrics.dynamic_instructions is None:
        raise ValueError(f"{metrics.name}: the dynamic count is missing; measure it with streamed_bytes")
    flight = metrics.in_flight_per_sm(card.sms)
    busy = min(metrics.programs, card.sms)
    on_card = min(flight * busy, max(traffic.read, 1))
    return Bound(
        card=card.name,
        budget=card.issue_budget,
        dram=traffic.dram / (card.bandwidth * 1e9),
        issue=metrics.dynamic_instructions / (card.issue_rate * busy / card.sms),
        latency=traffic.read / on_card * LATENCY if on_card else 0.0,
        in_flight_per_sm=flight,
    )
