"""`granite-kernels bench offline`: a decode step examined without a GPU; `examine_all` writes the committed matrix."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import triton
from granite_kernels.model import step

import granite_kernels

from .cards import ARCHITECTURES
from .examine import Case, Report, examine, from_json

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


def examine_all(cases: Iterable[tuple[Case, int]] = MATRIX, folder: Path = RESULTS, workers: int = 2) -> list[Report]:
    """Examine each case and architecture, and write `offline.md` and `offline.json` in `folder`, with progress on stderr.

    Both are written after every report: a run that was interrupted goes on where it stopped, as long as the kernels, which the
    reports name by a digest of their sources, and Triton are the same.
    """
    cases = list(dict.fromkeys(cases))
    digest = sources()
    done = _known(folder / "offline.json", digest)
    lock = threading.Lock()

    def run(case: Case) -> None:  # its architectures in turn: they share most of the traces
        for arch in (arch for other, arch in cases if other == case and (case, arch) not in done):
            begun = time.perf_counter()
            report = examine(case, arch)
            with lock:
                done[case, arch] = report
                _write([done[key] for key in cases if key in done], digest, folder)
            print(f"[{len(done)}/{len(cases)}] sm_{arch} {case}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, dict.fromkeys(case for case, _ in cases)))
    return [done[key] for key in cases]


def sources() -> str:
    """A digest of all that decides what a decode step launches."""
    package, model = Path(granite_kernels.__file__).parent, Path(step.__file__).parent
    files = [*package.glob("*.py"), *package.glob("kernels/*.py"), *package.glob("linear/*.py"), *package.glob("formats/*.py")]
    files += [model / name for name in ("granite.py", "step.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def _known(file: Path, digest: str) -> dict[tuple[Case, int], Report]:
    """The reports in `file` that still hold."""
    records = json.loads(file.read_text()) if file.exists() else {}
    if records.get("sources") != digest or records.get("triton") != triton.__version__:
        return {}
    return {(report.case, report.arch): report for report in map(from_json, records["reports"])}


def _write(reports: Sequence[Report], digest: str, folder: Path) -> None:
    from .tables import markdown

    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"sources": digest, "triton": triton.__version__})
    lines = ",\n".join(json.dumps(report.to_json()) for report in reports)
    (folder / "offline.json").write_text(f'{head[:-1]}, "reports": [\n{lines}\n]}}\n')
    (folder / "offline.md").write_text(markdown(reports))


def main(argv: Sequence[str] | None = None) -> None:
    offline.main(args=None if argv is None else list(argv))
