"""Pictures of a report, drawn with matplotlib from the same rows as its tables.

Colours belong to implementations, in a fixed order that colour-blind eyes can tell apart, whatever is shown with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .engines import ACCELERATED, FAST_DECODE, STATIC, TRANSFORMERS
from .harness import COMPILED, EAGER, OURS
from .others import LLAMA
from .rivals import CUBLAS, GROUPED, LIGER, PLAIN, SDPA
from .rows import OK, Row

INK, MUTED, GRID, PAPER = "#1b1b1a", "#63625d", "#e4e3de", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#2a6fdb", "#d9731a", "#1c8a5a", "#7d5bd0", "#c03a4a", "#8a8984"
COLOURS = {
    OURS: BLUE,
    PLAIN: BLUE,
    TRANSFORMERS: ORANGE,
    EAGER: ORANGE,
    STATIC: GREEN,
    ACCELERATED: RED,
    FAST_DECODE: GREY,
    COMPILED: GREEN,
    LLAMA: PURPLE,
    LIGER: PURPLE,
    CUBLAS: GREY,
    GROUPED: RED,
    SDPA: RED,
}
OURS_SHADES = (BLUE, "#123f8c", "#00a3b5", "#6ea8ff", "#5b4bd1", "#9db8e8")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
MATRICES = {"qkv", "o", "gate_up", "down", "logits", "experts_gate_up_swiglu", "experts_down_add"}  # roles that a step can't lack
OTHERS = "the library: product, F.rms_norm, ..."


def draw(header: dict[str, Any], rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draw what the rows hold, as `stem`-<what>.png; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.edgecolor": GRID,
        "axes.grid": True,
        "grid.color": GRID,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "legend.frameon": False,
        "figure.facecolor": PAPER,
    }
    written = []
    with pyplot.rc_context(style):
        for name, picture in (("speed", speed), ("roofline", roofline), ("memory", memory), ("step", step)):
            figure = picture(pyplot, header, [row for row in rows if row["status"] == OK])
            if figure is not None:
                target = stem.with_name(f"{stem.name}-{name}.png")
                figure.savefig(target, dpi=150, bbox_inches="tight")
                pyplot.close(figure)
                written.append(target)
    return written


def colour(implementation: str, shade: int = 0) -> str:
    """An implementation's colour; ours in as many shades as there are formats."""
    return OURS_SHADES[shade % len(OURS_SHADES)] if implementation == OURS else COLOURS.get(implementation, GREY)


def subtitle(figure: Any, title: str, header: dict[str, Any]) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    commit = f", {header['commit']}" if header.get("commit") else ""
    text = f"{header['device']}, {header['date'][:10]}{commit}"
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color=MUTED)


# ------------------------------------------------------------------ tokens/s against context and batch


def speed(pyplot: Any, header: dict[str, Any], rows: Sequence[Row]) -> Any:
    """Decoding by context (one sequence) and by batch (shortest context), and prefill by batch."""
    speeds = [row for row in rows if row["kind"] == "speed"]
    decoding = [row for row in speeds if row["test"].startswith("tg")]
    if not decoding:
        return None
    panels: list[tuple[str, str, str, list[Row]]] = []
    contexts = [row for row in decoding if row["batch"] == min(row["batch"] for row in decoding)]
    panels.append(("Decoding, one sequence", "tokens in the cache", "context", contexts))
    batches = [row for row in decoding if row["context"] == min(row["context"] for row in decoding)]
    if len({row["batch"] for row in batches}) > 1:
        panels.append(("Decoding, all sequences", "batch", "batch", batches))
    prompts = [row for row in speeds if row["test"].startswith("pp")]
    if prompts:
        longest = max((row["test"] for row in prompts), key=lambda name: int(name[2:]))
        panels.append((f"Prompt of {longest[2:]} tokens", "batch", "batch", [row for row in prompts if row["test"] == longest]))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels) + 2.5 * (len(panels) > 1), 3.4), layout="constrained")
    lines: dict[str, Any] = {}
    for axis, (title, label, field, shown) in zip(axes if len(panels) > 1 else [axes], panels, strict=True):
        ticks = sorted({row[field] for row in shown})
        axis.set_title(title)
        if len(ticks) == 1:
            _bars(axis, shown, f"{label}: {_short(ticks[0])}")
            continue
        places = {value: index for index, value in enumerate(ticks)}
        names = {name: index for index, name in enumerate(dict.fromkeys(_series(row) for row in speeds))}
        for name, mine in _by(shown, _series):
            ordered = sorted(mine, key=lambda row: row[field])
            line = axis.errorbar(
                [places[row[field]] for row in ordered],
                [row["tokens_per_second"] for row in ordered],
                yerr=[row.get("deviation") or 0 for row in ordered],
                color=colour(ordered[0]["implementation"], names[name]),
                marker=MARKS[names[name] % len(MARKS)],
                markersize=6,
                linewidth=2,
                capsize=3,
            )
            lines.setdefault(name, line)
        axis.set(xlabel=label, ylabel="tokens/s", ylim=(0, None), xlim=(-0.4, len(ticks) - 0.6))
        axis.set_xticks(range(len(ticks)), [_short(value) for value in ticks])
        axis.grid(axis="x", visible=False)
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside right center", fontsize=9)
    subtitle(figure, f"Tokens a second, {speeds[0]['model']}", header)
    return figure


def _bars(axis: Any, shown: Sequence[Row], label: str) -> None:
    """One value each: lines have nothing to connect."""
    for place, row in enumerate(shown):
        value = row["tokens_per_second"]
        axis.barh(place, value, xerr=row.get("deviation") or 0, height=0.6, color=colour(row["implementation"]), ecolor=MUTED, capsize=3)
        axis.annotate(_series(row), (0, place - 0.36), xytext=(0, 2), textcoords="offset points", va="bottom", fontsize=9)
        written = f"{value:,.1f} ± {row.get('deviation') or 0:,.1f}"
        axis.annotate(written, (0, place), xytext=(6, 0), textcoords="offset points", ha="left", va="center", color=PAPER)
    axis.set(xlabel=f"tokens/s ({label})", xlim=(0, None), ylim=(len(shown) - 0.6, -0.8))
    axis.set_yticks([])
    axis.grid(axis="y", visible=False)


def _series(row: Row) -> str:
    return f"{row['implementation']}, {row['format']}"


def _short(value: int) -> str:
    return f"{value // 1024}K" if value >= 1024 and value % 1024 == 0 else str(value)


def _by(rows: Iterable[Row], name: Callable[[Row], str]) -> Iterable[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found.items()


# ------------------------------------------------------------------ roofline


def roofline(pyplot: Any, header: dict[str, Any], rows: Sequence[Row]) -> Any:
    """Operations a second of every kernel over its operations a byte, under the roof that was measured in the same run."""
    kernels = [row for row in rows if row["kind"] == "kernel" and row["flops"]]
    roofs = {row["what"].split()[0]: row for row in rows if row["kind"] == "roof"}
    if not kernels or not {"read", "copy", "matmul"} <= roofs.keys():
        return None
    bandwidth = max(roofs["read"]["gbps"], roofs["copy"]["gbps"])
    peak = 1e3 * roofs["matmul"]["tflops"]
    figure, axis = pyplot.subplots(figsize=(9.5, 5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in kernels]
    low, high = min(intensities) / 2, max(*intensities, peak / bandwidth) * 3
    corner = peak / bandwidth
    axis.plot([low, corner, high], [low * bandwidth, peak, peak], color=INK, linewidth=1.5)
    told = f"roof: {bandwidth:,.0f} GB/s, {peak / 1e3:,.3g} TFLOP/s"
    axis.annotate(told, (0.02, 0.96), xycoords="axes fraction", va="top", fontsize=9, color=MUTED)
    marks = {op: MARKS[index % len(MARKS)] for index, op in enumerate(dict.fromkeys(row["op"] for row in kernels))}
    for row in kernels:
        axis.scatter(
            row["flops"] / row["bytes"],
            1e3 * row["tflops"],
            s=44,
            color=colour(row["implementation"]),
            marker=marks[row["op"]],
            edgecolor=PAPER,
            linewidth=0.7,
            zorder=3,
        )
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", xlim=(low, high))
    from matplotlib.lines import Line2D

    shown = dict.fromkeys(row["implementation"] if row["implementation"] in COLOURS else OTHERS for row in kernels)
    whose = [Line2D([], [], color=colour(name), marker="o", linestyle="", label=name) for name in shown]
    what = [Line2D([], [], color=MUTED, marker=mark, linestyle="", label=op) for op, mark in marks.items()]
    gap = Line2D([], [], linestyle="", label=" ")
    figure.legend(handles=[*whose, gap, *what], loc="outside right center", fontsize=9)
    subtitle(figure, "Roofline, the roof measured in the same run", header)
    return figure


# ------------------------------------------------------------------ memory by format and context


def memory(pyplot: Any, header: dict[str, Any], rows: Sequence[Row]) -> Any:
    """Peak bytes of one sequence by format and context, of each implementation."""
    shown = [row for row in rows if row["kind"] == "speed" and row["test"].startswith("tg") and row.get("peak_allocated")]
    shown = [row for row in shown if row["batch"] == min(row["batch"] for row in shown)]
    if not shown:
        return None
    series = list(_by(shown, _series))
    contexts = sorted({row["context"] for row in shown})
    figure, axis = pyplot.subplots(figsize=(7, 0.9 + 0.32 * len(series) * len(contexts)), layout="constrained")
    labels, place = [], 0
    for name, mine in series:
        for row in sorted(mine, key=lambda row: row["context"]):
            gigabytes = row["peak_allocated"] / 1e9
            axis.barh(place, gigabytes, height=0.72, color=colour(row["implementation"]))
            axis.annotate(f"{gigabytes:.2f}", (gigabytes, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
            labels.append(f"{name}, {_short(row['context'])}" if row["context"] else name)
            place += 1
    axis.set_yticks(range(place), labels)
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("peak GB of the process, everything included" if shown[0].get("memory_of") else "peak GB allocated on the GPU")
    subtitle(figure, f"Memory by weights and context, {shown[0]['model']}", header)
    return figure


# ------------------------------------------------------------------ time of a decode step by kernel


def step(pyplot: Any, header: dict[str, Any], rows: Sequence[Row]) -> Any:
    """What a decode step of one sequence would take by the kernels alone: each one's time by how often it runs."""
    kernels = [row for row in rows if row["kind"] == "kernel" and row["times"] and row["tokens"] == 1]
    roles = list(dict.fromkeys(row["role"] for row in kernels))
    median: dict[tuple[str, str], float] = {}
    for row in (row for row in kernels if not row.get("part")):
        name = row["implementation"] if row["format"] == "dense" else f"{row['implementation']}, {row['format']}"
        median.setdefault((name, row["role"]), row["times"] * row["median_us"] / 1e3)  # attention at the first, shortest context
    names = tuple(dict.fromkeys(name for name, _ in median))
    for name, role in ((name, role) for name in names for role in roles):
        same = EAGER if name == PLAIN else name.split(", ")[0]  # for what takes no matrix
        if (same, role) in median:
            median.setdefault((name, role), median[same, role])
    whole = [name for name in names if all((name, role) in median for role in MATRICES & set(roles))]
    if not whole:
        return None
    figure, axis = pyplot.subplots(figsize=(8.5, 1.3 + 0.5 * len(whole)), layout="constrained")
    shades = ("#184a9c", "#2a6fdb", "#6f9fe8", "#b3cdf4", "#1c8a5a", "#7cc4a3", "#d9731a", "#f0b37e")
    for place, name in enumerate(whole):
        left = 0.0
        for role in roles:
            shade = shades[roles.index(role) % len(shades)]
            axis.barh(place, median.get((name, role), 0.0), left=left, height=0.6, color=shade, edgecolor=PAPER, linewidth=1.5)
            left += median.get((name, role), 0.0)
        axis.annotate(f"{left:,.1f} ms", (left, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(range(len(whole)), whole)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("ms: the median of each kernel times its launches in a step")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=shades[index % len(shades)]) for index in range(len(roles))]
    figure.legend(handles, roles, loc="outside right center", fontsize=9)
    subtitle(figure, "Time of a decode step by kernel, one sequence", header)
    return figure
