"""`make gpu`: everything worth measuring on a GPU into results/<gpu>.json, most telling first, each row kept as it comes.

Needs torch, triton and what they bring; transformers and matplotlib only for what is theirs. A stage that fails is a row and the next
one begins. A run that was cut short, or whose time was up, is gone on with by the same command: what is in the file already, from the same
commit, versions and card, isn't measured again. `--device cpu` rehearses all of it without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from . import kernels, report
from .engines import ACCELERATED, FAST_DECODE, STATIC, TRANSFORMERS
from .harness import OURS, first_line
from .machine import Busy, header, slug
from .rows import ERROR, OK, Recorder, Row, key, load
from .run import Plan, run
from .tables import tested

FORMATS = ("", "q8_0", "q6_k", "q4_k_m", "int8", "int4")


def stages(preset: str, device: str, done: Sequence[Row]) -> Iterator[tuple[str, float, Callable[[float], Iterable[Row]]]]:
    """(name, share of what time is left, rows within so many minutes): the headline, kernels, packed kernels, all else. `done`: rows that
    grow while it runs, none of which is measured again.
    """
    model = f"random:{preset}"
    packs = ("q8_0", "q6_k", "q4_k_m", "int8", "int4")

    def known() -> tuple[tuple[object, ...], ...]:
        return tuple(key(row) for row in done if row["status"] == OK)

    def headline(given: float) -> Iterable[Row]:
        both = (OURS, TRANSFORMERS)
        return run(
            Plan(model, (512,), 128, (0, 1024), (1,), FORMATS, both, device=device, minutes=given, repeats=5, starts=False, done=known())
        )

    def dense(given: float) -> Iterable[Row]:
        return kernels.run(preset=preset, device=device, minutes=given, done=known())

    def packed(given: float) -> Iterable[Row]:
        linear = functools.partial(kernels.run, ops=("linear",), tokens=(1, 8), formats=packs)
        return linear(preset=preset, device=device, minutes=given, done=known())

    def rest(given: float) -> Iterable[Row]:
        everybody = (OURS, TRANSFORMERS, ACCELERATED, FAST_DECODE, STATIC)
        return run(Plan(model, formats=("", "q4_k_m"), implementations=everybody, device=device, minutes=given, done=known()))

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


def earlier(path: Path, header: dict[str, object]) -> list[Row]:
    """The rows with figures of a run that `path` holds, where it was of the same code on the same machine."""
    if not path.exists():
        return []
    before, rows = load(path)
    same = all(before.get(name) == header[name] for name in ("device", "commit", "versions"))
    return [row for row in rows if row["status"] == OK] if same and header["commit"] is not None else []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="the folder for <gpu>.json")
    parser.add_argument("--preset", default="3.1-2b")
    parser.add_argument("--minutes", type=float, default=9.0, help="what all of it may take")
    parser.add_argument("--device", default="cuda:0", help="cpu: a rehearsal")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing to benchmark here; `granite-kernels bench` measures what a CPU can", file=sys.stderr)
        return 2
    about, busy = header(device, command=f"make gpu, preset {given.preset}, {given.minutes:g} minutes"), Busy()
    path = given.results / f"{slug(about['device'])}.json"
    kept = earlier(path, about)
    print(f"{path}: {len(kept)} rows are there already" if kept else f"{path}: begun", flush=True)
    recorder = Recorder(about, path, show=lambda row: print(told(row), flush=True), rows=kept)
    until = time.monotonic() + 60 * given.minutes
    try:
        for name, share, rows in stages(given.preset, str(device), recorder.rows):
            left = max((until - time.monotonic()) / 60, 0.2)
            print(f"== {name}: {left * share:.1f} minutes", flush=True)
            recorder.take(guarded(name, lambda rows=rows, part=left * share: rows(part)))  # type: ignore[misc]  # mypy can't type it
    finally:
        recorder.tell(others=busy.others())
        page = path.with_suffix(".md")
        page.write_text(report.markdown(recorder.header, recorder.rows))
        print(f"{path}\n{page}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
