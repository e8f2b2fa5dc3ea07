"""`granite-kernels bench MODEL`, `bench kernels`, `bench compare` and `bench report`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .rows import Row
    from .tables import Table

JSON = click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here, as they come.")
REPORT = click.option("--report", is_flag=True, help="With --json: write markdown, CSV and pictures beside it.")
QUICK = click.option("--quick", is_flag=True, help="Less of everything: under a minute.")
MINUTES = click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="What this run may take; the rest is left out.")
DEVICE = click.option("--device", default=None, help="cuda, cuda:1 or cpu. Default: the first GPU, else the CPU.")


@click.command("kernels")
@click.option("--op", "ops", multiple=True, help="An operation or a file of them, as rms_norm or linear. Default: all.")
@click.option("--preset", default="3.1-2b", show_default=True)
@click.option("--tokens", type=click.IntRange(1), multiple=True, help="Default: 1, 8 and 512 (64 on a CPU).")
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(2),
    multiple=True,
    help="Tokens in the cache of a decode step; but for attention_decode only the first. Default: 1024, 16384 and, on a GPU, 131072.",
)
@click.option("--dtype", help="bfloat16, float16, float32. Default: bfloat16 on a GPU, float32 on a CPU.")
@click.option("--quantization", "formats", multiple=True, help="Format of the matrices, as q8_0, q4_k_m, int4; none is the dtype's own.")
@DEVICE
@QUICK
@MINUTES
@JSON
@REPORT
def kernels(json_file: Path | None, report: bool, **values: Any) -> None:
    """Each operation against eager PyTorch, torch.compile, the library's best and Liger: verified, then timed."""
    from . import kernels as measured

    record(measured.run(**values), values["device"], json_file, report)


@click.command("model")
@click.argument("model")
@click.option("--prompt", "prompts", type=click.IntRange(1), multiple=True, help="ppN. Default: 512 and, on a GPU, 2048.")
@click.option("--generate", "generated", type=click.IntRange(1), help="tgN. Default: 128 (16 on a CPU).")
@click.option("--context", "contexts", type=click.IntRange(0), multiple=True, help="Default: 0, 1024, 16384, 131072.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Default: 1, 4, 8 and 16 (1 and 4 on a CPU).")
@click.option("--quantization", "formats", multiple=True, help="Formats of ours. Default on a GPU: as stored and all others.")
@click.option("--implementation", "implementations", multiple=True, help="Default: ours, transformers eager, transformers compiled.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--backend", default="auto", show_default=True, help="Of ours: auto, triton, torch.")
@click.option("--repeats", type=click.IntRange(1), help="Requests a test. Default: 5 (3 on a CPU).")
@DEVICE
@QUICK
@MINUTES
@JSON
@REPORT
def model(json_file: Path | None, report: bool, **values: Any) -> None:
    """MODEL end to end: tokens/s, latency, memory and energy of ours, transformers and llama.cpp; start-up; without a GPU a model of
    the decode step instead.
    """
    from .end_to_end import ENGINES
    from .run import Plan, run

    values["implementations"] = tuple(_engine(name, ENGINES) for name in values["implementations"]) or ENGINES
    record(run(Plan(**values)), values["device"], json_file, report)


def _engine(name: str, known: tuple[str, ...]) -> str:
    found = [full for full in known if full == name or full.startswith(name)] or [full for full in known if name in full]
    if not found:
        raise click.BadParameter(f"{name!r}: expected a part of {', '.join(map(repr, known))}")
    return found[0]


@click.command("compare")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Changes below it are none.")
@click.option("--all", "everything", is_flag=True, help="Show every row.")
def compare(before: Path, after: Path, threshold: float, everything: bool) -> int:
    """Hold report AFTER against BEFORE and mark what became slower; exit code 1 where something did."""
    from . import compare as comparison
    from .rows import load

    (old_header, old), (new_header, new) = load(before), load(after)
    for line in comparison.differences(old_header, new_header):
        click.echo(f"not the same: {line}", err=True)
    changes = comparison.compare(old, new, threshold)
    shown = comparison.as_table(changes, everything=everything)
    if shown.cells:
        show([shown])
    click.echo(comparison.told(changes))
    return 1 if comparison.regressed(changes) else 0


@click.command("report")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--pictures/--no-pictures", default=True, show_default=True)
@click.option("--readme", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Renew the tables between its markers.")
def report(files: tuple[Path, ...], pictures: bool, readme: Path | None) -> None:
    """Markdown, CSV and pictures from the JSON of runs; with --readme README.md its tables, from the committed results."""
    from . import report as pages

    for file in files:
        for written in pages.write(file, pictures=pictures):
            click.echo(written)
    if readme is not None:
        changed = pages.update_readme(readme)
        click.echo(f"{readme}: {'renewed' if changed else 'as it was'}")


# ------------------------------------------------------------------ showing and keeping rows


def record(rows: Iterable[Row], device: str | None, path: Path | None, report: bool) -> None:
    """Run, with progress on a terminal; print the tables of what was measured, also where Ctrl-C cut it short."""
    from granite_kernels.model.loading import resolve_device

    from . import report as pages
    from .machine import Busy, header
    from .rows import Recorder
    from .tables import header_lines, tables

    if report and path is None:
        raise click.UsageError("--report goes with --json FILE: it writes beside that file")
    rows, busy = iter(rows), Busy()
    with contextlib.ExitStack() as closing:
        first = next(rows, None)  # bad input is told before a file is begun
        recorder = Recorder(header(resolve_device(device), command=" ".join(["granite-kernels", *sys.argv[1:]])), path)
        try:
            if first is not None:
                recorder.add(first)
            for row in closing.enter_context(progress(rows)):
                recorder.add(row)
        finally:
            recorder.tell(others=busy.others())
            click.echo("\n".join(header_lines(recorder.header)))
            show(tables(recorder.rows))
            if report and path is not None:
                for written in pages.write(path):
                    click.echo(written)


@contextlib.contextmanager
def progress(rows: Iterator[Row]) -> Iterator[Iterator[Row]]:
    """The rows, with the last one told beside a bar on a terminal."""
    from tqdm import tqdm

    with tqdm(desc="measuring", unit=" rows", leave=False, disable=not sys.stderr.isatty()) as bar:

        def passing() -> Iterator[Row]:
            for row in rows:
                bar.set_postfix_str(" ".join(str(row.get(name)) for name in ("op", "test", "implementation") if row.get(name)))
                bar.update()
                yield row

        yield passing()


def show(shown: Iterable[Table]) -> None:
    from granite_kernels.model.cli_tables import console

    from .tables import rich_table

    target = console()
    for one in shown:
        if one.cells:
            target.print(rich_table(one))
        else:  # why there are no figures is all there is to tell
            target.print("\n".join((one.title, *one.notes)), soft_wrap=True)
