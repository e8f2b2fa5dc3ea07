"""Rows as tables: for the terminal, for markdown, both from the same cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .rows import OK, Row

if TYPE_CHECKING:
    from rich.console import RenderableType

Cell = Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    texts: int = 1  # leading columns that are text, not numbers
    notes: tuple[str, ...] = ()


def number(name: str, pattern: str = "{:,.1f}", scale: float = 1.0) -> Cell:
    """The cell of a figure; a dash where the row has none."""
    return lambda row: pattern.format(scale * row[name]) if isinstance(row.get(name), int | float) else "-"


def text(name: str) -> Cell:
    return lambda row: str(row.get(name, "") if row.get(name) is not None else "-")


def spread(name: str, low: str, high: str) -> Cell:
    return lambda row: f"{row[name]:,.1f} [{row[low]:,.1f}-{row[high]:,.1f}]" if name in row else "-"


def plus_minus(name: str, deviation: str, pattern: str = "{:,.2f}") -> Cell:
    """A mean and its deviation; the figure alone where it was measured once, and a dash where not at all."""

    def cell(row: Row) -> str:
        if not isinstance(row.get(name), int | float):
            return "-"
        spread = row.get(deviation)
        return pattern.format(row[name]) + (f" ± {pattern.format(spread)}" if spread is not None else "")

    return cell


def unmeasured(rows: Iterable[Row], subject: Cell) -> tuple[str, ...]:
    """A line for each reason why rows have no figures: who, why, and for what."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != OK:
            about = found.setdefault((row["implementation"], row["status"], row.get("note") or ""), [])
            if subject(row).strip() not in about:
                about.append(subject(row).strip())
    return tuple(
        f"{who or 'all'}, {status}{': ' + note if note else ''} ({', '.join(filter(None, about))})"
        for (who, status, note), about in found.items()
    )


def tested(row: Row) -> str:
    """A test as llama-bench writes it: tg128 @ d1024."""
    return f"{row['test']} @ d{row['context']}" if row["context"] else str(row["test"])


KERNEL_LEGEND = (
    "of the roof: the time that bytes and operations need at the measured roof, over the time taken. error: the largest against float64. "
    "over the rule: a rival less accurate than ours may be. a part: does less than the operation, so it is not compared."
)
KERNELS: dict[str, Cell] = {
    "operation": text("op"),
    "size": text("size"),
    "tokens": text("tokens"),
    "weights": lambda row: row["dtype"] if row["format"] in ("dense", "") else row["format"],
    "implementation": text("implementation"),
    "us, median [p20-p80]": spread("median_us", "p20_us", "p80_us"),
    "over eager": number("speedup", "{:.2f}x"),
    "GB/s": number("gbps"),
    "TFLOP/s": number("tflops", "{:.3g}"),
    "of the roof": number("roof_share", "{:.0%}"),
    "bound by": text("bound"),
    "error": number("error", "{:.1e}"),
    "eager's": number("eager_error", "{:.1e}"),
    "": lambda row: row.get("note") or "",
}
SPEED: dict[str, Cell] = {
    "implementation": text("implementation"),
    "weights": text("format"),
    "batch": text("batch"),
    "test": lambda row: tested(row),
    "tokens/s": plus_minus("tokens_per_second", "deviation"),
    "TTFT ms": number("ttft_ms"),
    "TPOT ms p50": number("tpot_p50_ms", "{:.2f}"),
    "p90": number("tpot_p90_ms", "{:.2f}"),
    "p99": number("tpot_p99_ms", "{:.2f}"),
    "GB/s": number("gbps"),
    "MBU": number("mbu", "{:.0%}"),
    "peak GB": number("peak_allocated", "{:.2f}", 1e-9),
    "reserved GB": number("peak_reserved", "{:.2f}", 1e-9),
    "J/token": number("joules_per_token", "{:.3f}"),
    "": lambda row: row.get("note") or "",
}
STARTUP: dict[str, Cell] = {
    "implementation": text("implementation"),
    "weights": text("format"),
    "compile cache": text("cache"),
    "import s": number("import_s", "{:.2f}"),
    "load s": number("load_s", "{:.2f}"),
    "first token s": number("first_token_s", "{:.2f}"),
    "of it compiling": number("compile_s", "{:.2f}"),
    "total s": number("total_s", "{:.2f}"),
    "": lambda row: row.get("note") or "",
}
MODELLED: dict[str, Cell] = {
    "launch": text("launch"),
    "a step": text("times"),
    "MB": number("bytes", "{:,.2f}", 1e-6),
    "registers": text("registers"),
    "spills": text("spills"),
    "shared KiB": number("shared", "{:.1f}", 1 / 1024),
    "instructions a byte": number("instructions_per_byte", "{:.3f}"),
    "modelled us": number("modelled_us", "{:.2f}"),
    "": lambda row: row.get("note") or "",
}


def table(title: str, columns: dict[str, Cell], rows: Iterable[Row], *, texts: int = 1, notes: tuple[str, ...] = ()) -> Table:
    """A table of the rows with figures; a column that is empty in all of them is left out."""
    cells = [[cell(row) for cell in columns.values()] for row in rows if row["status"] == OK]
    kept = [index for index in range(len(columns)) if any(line[index] not in ("", "-") for line in cells)]
    names = tuple(columns)
    lines = tuple(tuple(line[i] for i in kept) for line in cells)
    return Table(title, tuple(names[i] for i in kept), lines, sum(i < texts for i in kept), notes)


def tables(rows: Sequence[Row]) -> list[Table]:
    """All tables of a report: the roof, speed and start-up by model, kernels in the order measured, modelled steps."""
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    found = []
    roofs = [row for row in by_kind.get("roof", []) if row["status"] == OK]
    if roofs:
        told = tuple((r["what"], f"{r['gbps']:,.1f} GB/s" if "gbps" in r else f"{r['tflops']:,.3g} TFLOP/s") for r in roofs)
        found.append(Table("Roof, measured in this run", ("", "best"), told))
    for model, mine in grouped(by_kind.get("speed", []), "model"):
        notes = unmeasured(mine, lambda row: f"{tested(row)} batch {row['batch']}" if row["batch"] else row["format"])
        found.append(table(f"End to end, {model}", SPEED, mine, texts=2, notes=notes))
    for model, mine in grouped(by_kind.get("startup", []), "model"):
        title = f"Start-up, {model}: a new process to its first tokens"
        found.append(table(title, STARTUP, mine, texts=3, notes=unmeasured(mine, text("cache"))))
    if "kernel" in by_kind:
        mine = by_kind["kernel"]
        found.append(
            table("Kernels", KERNELS, mine, texts=5, notes=unmeasured(mine, lambda row: f"{row['op']} {row['size'].split(' ')[0]}"))
        )
    for model, mine in grouped(by_kind.get("modelled", []), "model"):
        title = f"A model, not a measurement: one decode step of {model}, {mine[0]['format']}, on {mine[0]['card'] or 'a GPU'}"
        note = "Compiled code and traced bytes of every launch; the time is the longest of memory, issue and latency, without gaps."
        failed = tuple(f"{row['status']}: {row.get('note')}" for row in mine if row["status"] != OK)
        found.append(table(title, MODELLED, mine, notes=(note, *failed)))
    return found


def grouped(rows: Iterable[Row], name: str) -> Iterable[tuple[str, list[Row]]]:
    """Rows by the value of a field, in the order in which it first occurs."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found.items()


def markdown_table(shown: Table) -> list[str]:
    def escaped(cell: str) -> str:
        return cell.replace("|", "\\|")

    lines = [f"| {' | '.join(shown.columns)} |"]
    lines.append("|" + "|".join("---" if index < shown.texts or not name else "---:" for index, name in enumerate(shown.columns)) + "|")
    lines += [f"| {' | '.join(map(escaped, line))} |" for line in shown.cells]
    return lines


def rich_table(shown: Table) -> RenderableType:
    import sys

    from rich import box
    from rich.table import Table as Drawn

    drawn = Drawn(
        title=shown.title,
        title_justify="left",
        caption="\n".join(shown.notes) or None,
        caption_justify="left",
        box=box.HEAVY_HEAD if sys.stdout.isatty() else None,
    )
    for index, name in enumerate(shown.columns):
        drawn.add_column(name, justify="left" if index < shown.texts or not name else "right")
    for line in shown.cells:
        drawn.add_row(*line)
    return drawn


def header_lines(header: dict[str, Any]) -> list[str]:
    """The header as lines of markdown."""
    gpu = header.get("gpu", {})
    named = {
        "device": header["device"],
        "driver": gpu.get("driver_version"),
        "CUDA": header.get("cuda"),
        "clocks": f"SM {gpu['clocks.max.sm']}, memory {gpu['clocks.max.mem']} at most; power limit {gpu['power.limit']}"
        if "clocks.max.sm" in gpu
        else None,
        "CPU": f"{header['cpu']}, {header['cores']} cores, {header['threads']} threads used, load {header['load']} at the start",
        "shared with": f"other programs, which kept {header['others']:.2f} of the {header['cores']} cores busy during this run"
        if header.get("others") is not None and header["kind"] == "cpu"
        else None,
        "versions": ", ".join(f"{name} {version}" for name, version in header["versions"].items()),
        "commit": header["commit"],
        "date": header["date"],
        "command": header.get("command"),
        "method": header["method"],
    }
    return [f"- {name}: {value}" for name, value in named.items() if value]
