"""A report as a table for the terminal and as rows for a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .cards import ARCHITECTURES, CARDS, Card, cards_of
from .limits import broken, partial_sums

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .examine import Report
    from .roofline import Examined

BUDGETS = tuple(card for card in CARDS if card.name in ("A100 80GB", "H100 SXM", "H200", "B200"))
ISSUE_BOUND = 0.75  # of a card's budget
COLUMNS = (
    "launch",
    "times",
    "grid x warps",
    "registers",
    "spills",
    "shared KiB",
    "programs/SM",
    "loads (bits: n)",
    "tensor core",
    "DRAM KB",
    "read by",
    "re-read",
    "instr/byte",
    "of budgets %",
    "in flight KiB/SM",
    "modelled us",
)
LEGEND = (
    "read by: the most programs that request one sector of weights or cache (evict_first loads). re-read: bytes of everything else that "
    "go to the SMs, as a share of the streamed ones. instr/byte: warp instructions a DRAM byte; a card's budget is what its schedulers "
    "can issue while a byte arrives, of which the launch takes so many per cent on A100, H100, H200 and B200. modelled: the longest of "
    "DRAM, issue and latency time (roofline.py); a model, not a measurement."
)


def name(launch: Examined) -> str:
    return launch.traffic.name.strip("_").removesuffix("_kernel")


def row(launch: Examined) -> tuple[str, ...]:
    """The cells of a launch, in the order of COLUMNS; modelled time on the architecture's first card."""
    traffic, code, first = launch.traffic, launch.metrics, launch.bounds[0]
    loads = code.streamed_widths or code.load_widths
    tensor = "+".join(f"{number} {name.split('.')[0]}" for name, number in code.tensor_core.items())
    return (
        name(launch),
        str(launch.times),
        f"{'x'.join(str(extent) for extent in code.grid if extent > 1) or '1'} x {code.num_warps}",
        str(code.registers),
        str(code.spills),
        f"{code.shared / 1024:.1f}",
        f"{code.blocks_per_sm} ({code.limited_by})",
        " ".join(f"{bits}: {number}" for bits, number in sorted(loads.items(), reverse=True)),
        tensor or "-",
        f"{traffic.dram / 1000:,.0f}",
        str(traffic.stream_readers or "-"),
        f"{traffic.reread / traffic.streamed:.2f}" if traffic.streamed else "-",
        f"{launch.instructions_per_byte:.3f}",
        " ".join(f"{100 * launch.instructions_per_byte / card.issue_budget:.0f}" for card in BUDGETS),
        f"{first.in_flight_per_sm / 1024:.0f}",
        f"{first.modelled * 1e6:.2f} {first.by}",
    )


def title(report: Report) -> str:
    case = report.case
    weights = "bfloat16" if case.quantization == "none" else case.quantization
    return f"Granite {case.preset}, {weights}, batch {case.batch}, context {case.context:,}, sm_{report.arch}, Triton {report.triton}"


def total(report: Report, card: Card) -> str:
    """One sentence on the whole step on a card."""
    seconds = report.modelled(card.name)
    dram = report.bytes / (card.bandwidth * 1e9)
    return (
        f"{card.name}: {report.count} launches, {report.bytes / 1e9:.3f} GB, modelled {seconds * 1e3:.3f} ms a step without launch gaps "
        f"({dram / seconds:.0%} of its bandwidth), budget {card.issue_budget:.3f} instructions a byte"
    )


def issue_bound(report: Report) -> str:
    """One sentence for each card on the launches that need more than ISSUE_BOUND of its budget."""
    sentences = []
    for card in BUDGETS:
        over = dict.fromkeys(name(launch) for launch in report.launches if launch.instructions_per_byte > ISSUE_BOUND * card.issue_budget)
        sentences.append(f"{card.name} ({card.issue_budget:.3f}): {', '.join(over) or 'none'}.")
    return f"Issue-bound, above {ISSUE_BOUND:.0%} of a card's budget: " + " ".join(sentences)


def judgement(report: Report) -> str:
    """What is re-read and written besides, and which limits are broken."""
    faults = "; ".join(broken(report)) or "none broken"
    return f"Re-read {report.reread:.3f} of what is streamed, partial sums {partial_sums(report):.2%} of the bytes. Limits: {faults}."


def rich_table(report: Report) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    table = Table(title=title(report), caption=LEGEND, caption_justify="left", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("launch", "tensor core") else "right")
    for launch in report.launches:
        table.add_row(*row(launch))
    return Group(table, judgement(report), issue_bound(report), *(total(report, card) for card in cards_of(report.arch)))


def markdown(reports: Sequence[Report], missing: int = 0) -> str:
    """All reports as one page; the header says what the numbers are, and how many of the matrix's cells are `missing`."""
    faults = sum(len(broken(report)) for report in reports)
    lines = ["# Decode launches examined without a GPU", "", LEGEND, ""]
    lines += [f"{len(reports)} steps examined, {missing} of the matrix not yet; limits (limits.py) broken: {faults}.", ""]
    lines += ["| step | " + " | ".join(f"sm_{arch}" for arch in ARCHITECTURES) + " |", "|---" * (len(ARCHITECTURES) + 1) + "|"]
    cells = {(report.case, report.arch): len(broken(report)) for report in reports}
    for case in dict.fromkeys(report.case for report in reports):
        marks = (cells.get((case, arch)) for arch in ARCHITECTURES)
        verdicts = " | ".join("-" if mark is None else f"{mark} broken" if mark else "kept" for mark in marks)
        lines.append(f"| {case.preset}, {case.quantization}, batch {case.batch}, context {case.context} | {verdicts} |")
    lines.append("")
    for report in reports:
        lines += [f"## {title(report)}", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(row(launch)) + " |" for launch in report.launches]
        lines += [
            "",
            judgement(report),
            "",
            f"- {issue_bound(report)}",
            *(f"- {total(report, card)}" for card in cards_of(report.arch)),
            "",
        ]
    return "\n".join(lines)
