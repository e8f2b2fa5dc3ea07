"""What else a report of a model holds: llama.cpp's own benchmark, and decode steps examined without a GPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .end_to_end import Test
from .harness import first_line
from .rows import ABSENT, ERROR, LEFT_OUT, OK, Row

LLAMA = "llama.cpp"


def llama_bench(
    source: str | Path, label: str, tests: Sequence[Test], repeats: int, *, on_gpu: bool, threads: int, until: float
) -> Iterator[Row]:
    """Rows of llama-bench for the tests of one sequence; a row that says so where it isn't installed or has nothing to read."""
    about: Row = {"kind": "speed", "model": label, "implementation": LLAMA, "format": "as stored"}
    missing = {"test": "all", "batch": None, "context": 0}
    program = shutil.which("llama-bench")
    if program is None:
        yield about | missing | {"status": ABSENT, "note": "llama-bench is not on the PATH"}
        return
    if Path(source).suffix != ".gguf":
        yield about | missing | {"status": ABSENT, "note": "llama.cpp reads GGUF files only"}
        return
    for test in (test for test in tests if test.batch == 1):
        row = about | {"test": test.name, "batch": 1, "context": test.context}
        left = until - time.time()
        if left < 1:
            yield row | {"status": LEFT_OUT, "note": "the time of this run is up; --minutes gives more"}
            continue
        sizes = ["-p", "0", "-n", str(test.new - 1), "-d", str(test.context)] if test.new > 1 else ["-p", str(test.prompt), "-n", "0"]
        command = [
            program,
            "-m",
            str(source),
            *sizes,
            "-r",
            str(repeats),
            "-t",
            str(threads),
            "-ngl",
            "99" if on_gpu else "0",
            "-o",
            "json",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=True)
            (told,) = json.loads(done.stdout)
            figures: Row = {"tokens_per_second": told["avg_ts"], "deviation": told["stddev_ts"], "repeats": repeats}
            figures |= {"format": told.get("model_type", ""), "build": told.get("build_commit", "")}
        except subprocess.TimeoutExpired:
            yield row | {"status": LEFT_OUT, "note": f"stopped after {left:.0f} s: the time of this run is up"}
        except (OSError, subprocess.CalledProcessError, ValueError, KeyError, TypeError) as error:
            yield row | {"status": ERROR, "note": first_line(error)}
        else:
            yield row | {"status": OK, **figures}


def modelled(*, preset: str, quantization: str, arch: int) -> Iterator[Row]:
    """One decode step examined without a GPU: a row a launch and one for the step, for the architecture's first card."""
    from .offline.cards import cards_of
    from .offline.examine import Case, examine

    report = examine(Case(preset, quantization), arch)
    card = cards_of(arch)[0]
    about: Row = {"kind": "modelled", "model": preset, "format": quantization, "card": card.name, "status": OK}
    for examined in report.launches:
        traffic, metrics = examined.traffic, examined.metrics
        yield about | {
            "launch": f"{traffic.name.strip('_').removesuffix('_kernel')} {'x'.join(map(str, traffic.grid))}",
            "times": examined.times,
            "bytes": traffic.dram,
            "registers": metrics.registers,
            "spills": metrics.spills,
            "shared": metrics.shared,
            "instructions_per_byte": examined.instructions_per_byte,
            "modelled_us": 1e6 * next(bound for bound in examined.bounds if bound.card == card.name).modelled,
        }
    total = {"launch": "the whole step", "times": report.count, "bytes": report.bytes, "modelled_us": 1e6 * report.modelled(card.name)}
    yield about | total | {"note": f"{1 / report.modelled(card.name):,.0f} tokens/s without gaps between launches; a bound, not a promise"}


def as_lists(tests: Sequence[Test]) -> list[list[object]]:
    """Tests as JSON carries them."""
    return [list(dataclasses.astuple(test)) for test in tests]
