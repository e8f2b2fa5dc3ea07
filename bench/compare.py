"""Two reports held against each other: what became slower by more than both runs' spread is marked.

A row is worse where its figure moved the wrong way by more than `threshold` and the intervals of the two runs, p20 to p80 for a
kernel and mean plus or minus deviation for tokens/s, don't meet. Where they do meet, it is "slower?": told, and no regression. A
row that stood still, but whose spread could hide the threshold, is noisy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .rows import OK, Row, key
from .tables import Table

THRESHOLD = 0.05


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured value and its interval; `more` where a larger one is better."""

    name: str
    value: float
    low: float
    high: float
    more: bool


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure of both runs. `ratio` is the speed of the second over the first: below 1 is worse."""

    key: tuple[Any, ...]
    before: Figure
    after: Figure
    ratio: float
    verdict: str  # "worse", "slower?", "better", "same", "noisy", or what happened to the row


def figures(row: Row) -> list[Figure]:
    """The figures of a row that are worth a comparison."""
    if row["status"] != OK:
        return []
    if row["kind"] == "kernel":
        return [Figure("median_us", row["median_us"], row["p20_us"], row["p80_us"], more=False)]
    if row["kind"] == "speed":
        value, spread = row["tokens_per_second"], row.get("deviation") or 0.0
        found = [Figure("tokens_per_second", value, value - spread, value + spread, more=True)]
        if row.get("peak_allocated"):
            found.append(_exact("peak_allocated", row["peak_allocated"]))
        return found
    return [_exact(name, row[name]) for name in ("modelled_us", "bytes") if row["kind"] == "modelled" and row.get(name)]


def _exact(name: str, value: float) -> Figure:
    return Figure(name, value, value, value, more=False)


def compare(before: list[Row], after: list[Row], threshold: float = THRESHOLD) -> list[Change]:
    """Every figure that both runs measured, and rows of the first that the second has lost."""
    second = {key(row): row for row in after}
    changes = []
    for row in before:
        other = second.get(key(row))
        if row["status"] == OK and (other is None or other["status"] != OK):
            verdict = "missing" if other is None else str(other["status"])
            changes += [Change(key(row), figure, figure, 0.0, verdict) for figure in figures(row)[:1]]
            continue
        for old, new in zip(figures(row), figures(other) if other else [], strict=False):
            changes.append(_judge(key(row), old, new, threshold))
    return changes


def _judge(about: tuple[Any, ...], old: Figure, new: Figure, threshold: float) -> Change:
    ratio = new.value / old.value if old.more else old.value / new.value
    apart = new.high < old.low or new.low > old.high
    spread = max((figure.high - figure.low) / (2 * figure.value) for figure in (old, new))
    if apart and not 1 - threshold <= ratio <= 1 / (1 - threshold):
        verdict = "worse" if ratio < 1 else "better"
    elif ratio < 1 - threshold:
        verdict = "slower?"
    else:
        verdict = "noisy" if spread > threshold else "same"
    return Change(about, old, new, ratio, verdict)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of the headers makes the comparison doubtful: another device, another version."""
    found = [f"{name}: {before.get(name)} and {after.get(name)}" for name in ("device", "threads") if before.get(name) != after.get(name)]
    old, new = before.get("versions", {}), after.get("versions", {})
    return found + [
        f"{name}: {old.get(name)} and {new.get(name)}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)
    ]


def as_table(changes: list[Change], *, everything: bool = False) -> Table:
    """The marked rows, or all."""
    order = ("worse", "missing", "error", "refused", "absent", "left out", "slower?", "noisy", "better", "same")
    shown = [change for change in changes if everything or change.verdict not in ("same", "noisy")]
    shown.sort(key=lambda change: (order.index(change.verdict), change.ratio))
    cells = tuple(
        (
            change.verdict,
            ", ".join(str(part) for part in change.key[1:] if part not in (None, "")),
            change.before.name,
            f"{change.before.value:,.2f}",
            f"{change.after.value:,.2f}" if change.ratio else "-",
            f"{change.ratio:.3f}x" if change.ratio else "-",
        )
        for change in shown
    )
    return Table("", ("", "row", "figure", "before", "after", "speed"), cells, texts=3)


def told(changes: list[Change]) -> str:
    """One line: how many rows of each verdict."""
    counts: dict[str, int] = {}
    for change in changes:
        counts[change.verdict] = counts.get(change.verdict, 0) + 1
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "nothing in common"


def regressed(changes: list[Change]) -> bool:
    return any(change.verdict not in ("same", "slower?", "noisy", "better") for change in changes)
