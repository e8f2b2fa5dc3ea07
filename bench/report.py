"""Reports of a run: markdown, CSV and pictures from the rows of its JSON file, and the tables in the README."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from granite_kernels.errors import GraniteError

from .rows import OK, Row, load, to_csv
from .tables import SPEED, grouped, header_lines, markdown_table, plus_minus, table, tables

RESULTS = Path(__file__).parent / "results"
MARKERS = ("<!-- {name}:begin -->", "<!-- {name}:end -->")
NOTHING = """\
No figure of a GPU has been measured yet: none was at hand. The kernels have run in Triton's interpreter and have been compiled, never
yet executed on a card, and neither has the captured step. `make gpu` on a machine that has one runs the tests and the benchmarks there."""


def markdown(header: dict[str, Any], rows: list[Row], pictures: Iterable[Path] = ()) -> str:
    """A whole report as one page."""
    lines = [f"# Benchmarks on {header['device']}", "", *header_lines(header), ""]
    for shown in tables(rows):
        lines += [f"## {shown.title}", "", *markdown_table(shown), ""]
        lines += [*(f"- {note}" for note in shown.notes), *([""] if shown.notes else [])]
    for picture in pictures:
        lines += [f"![{picture.stem.replace('-', ' ')}]({picture.name})", ""]
    return "\n".join(lines)


def write(source: Path, *, pictures: bool = True) -> list[Path]:
    """Write markdown, CSV and pictures beside a report's JSON file; the files written."""
    header, rows = load(source)
    drawn: list[Path] = []
    if pictures:
        from .pictures import draw

        drawn = draw(header, rows, source.with_suffix(""))
    page, sheet = source.with_suffix(".md"), source.with_suffix(".csv")
    page.write_text(markdown(header, rows, drawn))
    sheet.write_text(to_csv(rows))
    return [page, sheet, *drawn]


# ------------------------------------------------------------------ README


def committed(folder: Path = RESULTS) -> list[tuple[dict[str, Any], list[Row]]]:
    """The reports in a folder, GPUs first."""
    found = [load(path) for path in sorted(folder.glob("*.json")) if path.name != "offline.json"]
    return sorted(found, key=lambda report: report[0]["kind"] != "gpu")


def readme_block(reports: list[tuple[dict[str, Any], list[Row]]]) -> str:
    """What stands between the README's markers: a table of speed for each machine."""
    columns = {name: SPEED[name] for name in ("implementation", "weights", "batch", "test")}
    columns |= {"tokens/s": plus_minus("tokens_per_second", "deviation", "{:,.1f}")}
    columns |= {name: SPEED[name] for name in ("TTFT ms", "GB/s", "MBU", "peak GB", "J/token")}
    lines = [] if any(header["kind"] == "gpu" for header, _ in reports) else [NOTHING, ""]
    for header, rows in reports:
        versions, threads = header["versions"], header["threads"]
        used = "" if header["kind"] == "gpu" else f", {threads} thread{'s' if threads > 1 else ''}"
        about = f"{header['device']}{used}, torch {versions['torch']}, transformers {versions['transformers']}, {header['date'][:10]}"
        for model, mine in grouped((row for row in rows if row["kind"] == "speed" and row["status"] == OK), "model"):
            lines += [f"{model} on {about}:", "", *markdown_table(table("", columns, mine, texts=2)), ""]
    return "\n".join(lines).rstrip() + "\n"


def between_markers(page: str, name: str, block: str) -> str:
    """`page` with `block` between the markers `name`. Raises GraniteError where it has no such markers."""
    begin, end = (marker.format(name=name) for marker in MARKERS)
    if begin not in page or end not in page:
        raise GraniteError(f"the page has no markers {begin} and {end}; put them where the tables belong")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{block}{end}", page, flags=re.DOTALL)


def update_readme(readme: Path, folder: Path = RESULTS) -> bool:
    """Renew the tables between the README's markers from the committed results; whether anything changed."""
    page = readme.read_text()
    renewed = between_markers(page, "measured", readme_block(committed(folder)))
    readme.write_text(renewed)
    return renewed != page
