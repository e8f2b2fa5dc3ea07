"""`granite-kernels bench offline`: a decode step examined without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import click

from granite_kernels.formats import get

from .cards import ARCHITECTURES
from .examine import Case, examine
from .steps import UNQUANTIZED


@click.command("offline")
@click.argument("preset", default="3.1-2b")
@click.option(
    "--arch", type=click.Choice([str(number) for number in ARCHITECTURES]), default="90", show_default=True, help="Compute capability."
)
@click.option("--quantization", default="none", show_default=True, help="Format of all weights, as q4_k; none is bfloat16.")
@click.option("--batch", type=click.IntRange(1, 16), default=1, show_default=True)
@click.option("--context", type=click.IntRange(2, 131072), default=1024, show_default=True, help="Tokens in the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def offline(preset: str, arch: str, quantization: str, batch: int, context: int, as_json: bool) -> None:
    """Examine every launch of one decode step of PRESET without a GPU: compiled code, traffic, a static roofline."""
    if quantization != UNQUANTIZED:
        get(quantization)  # its error is for whoever asked, not for a child
    report = examine(Case(preset, quantization, batch, context), int(arch))
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
        return
    from rich.console import Console

    from .tables import rich_table

    wide = None if sys.stdout.isatty() else 200  # a pipe has no width of its own
    Console(width=wide).print(rich_table(report))


def main(argv: Sequence[str] | None = None) -> None:
    offline.main(args=None if argv is None else list(argv))
