"""`granite-kernels bench offline`: a decode step examined without a GPU; `examine_all` writes the committed matrix."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from .cards import ARCHITECTURES
from .examine import Case, Report, examine

RESULTS = Path(__file__).parents[1] / "results"
PRESETS = ("3.1-2b", "3.1-8b")
MATRIX = tuple((Case(preset, "none", batch), arch) for preset in PRESETS for batch in (1, 4, 16) for arch in ARCHITECTURES)


@click.command("offline")
@click.argument("preset", default="3.1-2b")
@click.option(
    "--arch", type=click.Choice([str(number) for number in ARCHITECTURES]), default="90", show_default=True, help="Compute capability."
)
@click.option("--quantization", default="none", show_default=True, help="Format of the weights; none is bfloat16.")
@click.option("--batch", type=click.IntRange(1, 16), default=1, show_default=True)
@click.option("--context", type=click.IntRange(2, 131072), default=1024, show_default=True, help="Tokens in the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def offline(preset: str, arch: str, quantization: str, batch: int, context: int, as_json: bool) -> None:
    """Examine every launch of one decode step of PRESET without a GPU: compiled code, traffic, a static roofline."""
    report = examine(Case(preset, quantization, batch, context), int(arch))
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
        return
    from rich.console import Console

    from .tables import rich_table

    wide = None if sys.stdout.isatty() else 200  # a pipe has no width of its own
    Console(width=wide).print(rich_table(report))


def examine_all(cases: Iterable[tuple[Case, int]] = MATRIX, folder: Path = RESULTS) -> list[Report]:
    """Examine each case and architecture, and write `offline.md` and `offline.json` in `folder`, with progress on stderr."""
    from .tables import markdown

    cases = list(cases)
    reports = []
    for number, (case, arch) in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] sm_{arch} {case}", file=sys.stderr, flush=True)
        reports.append(examine(case, arch))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "offline.md").write_text(markdown(reports))
    (folder / "offline.json").write_text("[\n" + ",\n".join(json.dumps(report.to_json()) for report in reports) + "\n]\n")
    return reports


def main(argv: Sequence[str] | None = None) -> None:
    offline.main(args=None if argv is None else list(argv))
