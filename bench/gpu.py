"""`make gpu`: everything worth measuring on a GPU into results/<gpu>.json, most telling first, each row kept as it comes.

Needs torch, triton and what they bring; transformers and matplotlib only for what is theirs. A stage that fails is a row and the next
one begins.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from . import kernels, report
from .engines import ACCELERATED, FAST_DECODE, STATIC, TRANSFORMERS
from .harness import OURS, first_line
from .machine import header, slug
from .rows import ERROR, Recorder, Row
from .run import Plan, run
from .tables import tested

FORMATS = ("", "q8_0", "q6_k", "q4_k_m", "int8", "int4")


def stages(preset: str, minutes: float) -> Iterator[tuple[str, float, Callable[[float], Iterable[Row]]]]:
    """(name, share of what time is left, rows within so many minutes): the headline, kernels, packed kernels, all else."""
    model = f"random:{preset}"

    def headline(given: float) -> Iterable[Row]:
        both = (OURS, TRANSFORMERS)
        return run(Plan(model, (512,), 128, (0, 1024), (1,), FORMATS, both, minutes=given, repeats=5, starts=False))

    def dense(given: float) -> Iterable[Row]:
        return kernels.run(preset=preset, minutes=given)

    def packed(given: float) -> Iterable[Row]:
        return kernels.run(preset=preset, ops=("linear",), tokens=(1, 8), formats=("q8_0", "q6_k", "q4_k_m", "int8", "int4"), minutes=given)

    def rest(given: float) -> Iterable[Row]:
        everybody = (OURS, TRANSFORMERS, ACCELERATED, FAST_DECODE, STATIC)
        return run(Plan(model, formats=("", "q4_k_m"), implementations=everybody, minutes=given))

    yield "headline", 0.35, headline
    yield "kernels", 0.4, dense
    yield "packed kernels", 0.3, packed
    yield "everything", 1.0, rest


def guarded(name: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """The rows, and one that says what went wrong where something did."""
    try:
        yield from rows()
    except Exception as error:
        about: Row = {"kind": "speed", "model": name, "implementation": "", "format": "", "test": "all", "batch": None, "context": 0}
        yield about | {"status": ERROR, "note": first_line(error)}


def told(row: Row) -> str:
    """A row in one line, for a log."""
    if row["kind"] == "kernel":
        figure = f"{row['median_us']:9.1f} us {row['gbps']:8.1f} GB/s {row['roof_share']:5.0%}" if "median_us" in row else row["status"]
        about = f"{row['op']:<22} {row['size']:<28} {row['tokens']:>4} {row['format']:<8} {row['implementation']:<24}"
        return f"{about} {figure} {row.get('note', '')}"
    if row["kind"] == "speed":
        figure = f"{row['tokens_per_second']:10.1f} tokens/s" if "tokens_per_second" in row else row["status"]
        return f"{row['implementation']:<44} {row['format']:<10} {tested(row):<16} {row['batch'] or '':>3} {figure} {row.get('note', '')}"
    return " ".join(str(value) for value in row.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="the folder for <gpu>.json")
    parser.add_argument("--preset", default="3.1-2b")
    parser.add_argument("--minutes", type=float, default=9.0, help="what all of it may take")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: nothing to benchmark here; `granite-kernels bench` measures what a CPU can", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    path = given.results / f"{slug(torch.cuda.get_device_name(device))}.json"
    command = f"make gpu, preset {given.preset}, {given.minutes:g} minutes"
    recorder = Recorder(header(device, command=command), path, show=lambda row: print(told(row), flush=True))
    until = time.monotonic() + 60 * given.minutes
    try:
        for name, share, rows in stages(given.preset, given.minutes):
            left = max((until - time.monotonic()) / 60, 0.2)
            print(f"== {name}: {left * share:.1f} minutes", flush=True)
            recorder.take(guarded(name, lambda rows=rows, part=left * share: rows(part)))  # type: ignore[misc]  # mypy can't type it
    finally:
        page = path.with_suffix(".md")
        page.write_text(report.markdown(recorder.header, recorder.rows))
        print(f"{path}\n{page}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
