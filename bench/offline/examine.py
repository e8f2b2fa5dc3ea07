"""Every launch of a decode step, examined without a GPU: traced in one process, compiled in another, put together here.

A step of one layer is traced and compiled at the model's real sizes; a step of two tells which launches belong to a layer,
and those count as often as the model has layers. Large grids are traced by a sample that is counted up exactly (`sampling`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import triton

from granite_kernels.errors import GraniteError

from . import metrics, sampling
from .cards import cards_of
from .child import in_child, load_entry
from .roofline import Bound, Examined, bound

STEP = f"{__package__}.steps:decode_step"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is examined: a preset with a weight format ("none": bfloat16), rows in the batch, tokens of context each."""

    preset: str = "3.1-2b"
    quantization: str = "none"
    batch: int = 1
    context: int = 1024


@dataclasses.dataclass(frozen=True)
class Report:
    """The launches of a decode step on one architecture, and their sums over the step."""

    case: Case
    arch: int
    triton: str
    layers: int
    launches: tuple[Examined, ...]

    @property
    def count(self) -> int:
        """Launches of the step."""
        return sum(launch.times for launch in self.launches)

    @property
    def bytes(self) -> int:
        """DRAM bytes of the step."""
        return sum(launch.times * launch.traffic.dram for launch in self.launches)

    @property
    def streamed(self) -> int:
        """Bytes of weights and cache, requested by loads marked evict_first."""
        return sum(launch.times * launch.traffic.streamed for launch in self.launches)

    @property
    def reread(self) -> float:
        """Bytes of everything else that go to the SMs, as a share of the streamed ones."""
        return sum(launch.times * launch.traffic.reread for launch in self.launches) / max(self.streamed, 1)

    def modelled(self, card: str) -> float:
        """Seconds of the step on a card by the model of `roofline`, without gaps between launches."""
        return sum(launch.times * next(b for b in launch.bounds if b.card == card).modelled for launch in self.launches)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the derived ones included."""
        cards = cards_of(self.arch)
        launches = []
        for launch in self.launches:
            bounds = [{**dataclasses.asdict(b), "modelled": b.modelled, "by": b.by} for b in launch.bounds]
            derived = {"instructions_per_byte": launch.instructions_per_byte, "times": launch.times, "bounds": bounds}
            launches.append({**derived, "traffic": dataclasses.asdict(launch.traffic), "metrics": metrics.to_json(launch.metrics)})
        total = {"launches": self.count, "bytes": self.bytes, "streamed": self.streamed, "reread": self.reread}
        return {
            "case": dataclasses.asdict(self.case),
            "arch": self.arch,
            "triton": self.triton,
            "layers": self.layers,
            "total": {**total, "modelled_seconds": {card.name: self.modelled(card.name) for card in cards}},
            "launches": launches,
        }


def from_json(record: dict[str, Any]) -> Report:
    """The inverse of `Report.to_json`."""
    fields = [field.name for field in dataclasses.fields(Bound)]
    launches = tuple(
        Examined(
            sampling.from_json(launch["traffic"]),
            metrics.from_json(launch["metrics"]),
            launch["times"],
            tuple(Bound(**{name: given[name] for name in fields}) for given in launch["bounds"]),
        )
        for launch in record["launches"]
    )
    return Report(Case(**record["case"]), record["arch"], record["triton"], record["layers"], launches)


def run_step(entry: str, preset: str, quantization: str, batch: int, context: int, layers: int, arch: int) -> None:
    """Build the step of `entry` and run it once: what the children call."""
    load_entry(entry)(preset, quantization, batch, context, layers, arch)()


def repetitions(one: Sequence[Any], two: Sequence[Any], layers: int) -> list[int]:
    """How often each launch of the one-layer step `one` occurs in a step of `layers`, told by the two-layer step `two`.

    Raises GraniteError where the second layer doesn't launch what the first does.
    """
    length = len(two) - len(one)
    for start in range(len(one) - length + 1) if length > 0 else ():
        body = list(one[start : start + length])
        if [*one[:start], *body, *body, *one[start + length :]] == list(two):
            return [layers if start <= position < start + length else 1 for position in range(len(one))]
    raise GraniteError(f"layers differ in their launches: {list(one)} for one, {list(two)} for two")


Traced = tuple[sampling.Traffic, list[tuple[str, int, float]]]
_KNOWN: dict[tuple[str, Case], dict[str, Traced]] = {}  # by key of the launch: architectures share most of them


def _traced(entry: str, case: Case, arch: int) -> list[Traced]:
    """The traffic of a step of one layer, and which shares of a launch's programs run its lines."""
    known = _KNOWN.setdefault((entry, case), {})
    arguments = [entry, *dataclasses.astuple(case), 1, arch]
    records = in_child(f"{__package__}.stages:trace_stage", f"{__name__}:run_step", arguments, list(known), interpret=True, timeout=3600)
    new = [record for record in records if record["traffic"] is not None]
    known |= {record["key"]: (sampling.from_json(record["traffic"]), record["shares"]) for record in new}
    return [known[record["key"]] for record in records]


def _compiled(entry: str, case: Case, arch: int, traced: list[Traced]) -> tuple[list[metrics.Metrics], list[tuple[str, tuple[int, ...]]]]:
    """The launches of a step of one layer, with dynamic counts; names and grids of those of two layers."""
    one, two = ([entry, *dataclasses.astuple(case), layers, arch] for layers in (1, 2))
    streamed, shares = [traffic.followed for traffic, _ in traced], [run_by for _, run_by in traced]
    arguments = f"{__name__}:run_step", one, two, arch, streamed, shares
    measured, launched = in_child(f"{__package__}.stages:compile_step", *arguments, interpret=False)
    return list(map(metrics.from_json, measured)), [(name, tuple(grid)) for name, grid in launched]


def examine(case: Case, arch: int = 90, *, layers: int | None = None, entry: str = STEP) -> Report:
    """Trace and compile one decode step. `layers`: of the model, by default the preset's; `entry`: see `steps.decode_step`.

    Raises GraniteError where trace and compiled code disagree on the launches, RuntimeError with the child's words where a
    kernel doesn't run or doesn't compile, and ValueError for an unknown architecture.
    """
    cards = cards_of(arch)
    if layers is None:
        from granite_kernels.model.config import GraniteConfig

        layers = GraniteConfig.preset(case.preset).num_hidden_layers
    traced = _traced(entry, case, arch)
    one, two = _compiled(entry, case, arch, traced)
    launched, seen = [(m.name, m.grid) for m in one], [(t.name, t.grid) for t, _ in traced]
    if launched != seen:
        raise GraniteError(f"interpreted and compiled runs launch different kernels: {seen} and {launched}")
    times = repetitions(launched, two, layers)
    examined = tuple(
        Examined(traffic, measured, often, tuple(bound(traffic, measured, card) for card in cards))
        for (traffic, _), measured, often in zip(traced, one, times, strict=True)
    )
    return Report(case, arch, triton.__version__, layers, examined)
