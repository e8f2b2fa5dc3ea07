"""Benchmarks of whole models: engines on the same weights, rows within a time, processes that fail."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from granite_kernels.bench import end_to_end, engines, run, startup
from granite_kernels.bench.child import in_turns, stream
from granite_kernels.bench.harness import OURS
from granite_kernels.bench.meters import Meters
from granite_kernels.bench.others import LLAMA, llama_bench
from granite_kernels.bench.roof import Roof
from granite_kernels.bench.rows import Row

from granite_kernels import GraniteForCausalLM
from tests import tiny

TESTS = end_to_end.plan((32,), 5, (0, 40), (1, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.make(), tmp_path_factory.mktemp("model"))


def rows_of(folder: Path, implementation: str, tests: list[end_to_end.Test] = TESTS, **changes: Any) -> list[Row]:
    arguments: dict[str, Any] = dict(options={"device": "cpu"}, repeats=2, bandwidth=1e10, seconds=60) | changes
    lists = run.as_lists(tests)
    return list(end_to_end.run(implementation=implementation, model=str(folder), label="tiny", tests=lists, **arguments))


@pytest.mark.parametrize("kind", ["granite", "granitemoe", "granitemoeshared", "llama"])
def test_transformers_gets_our_weights_under_its_names(kind: str, tmp_path: Path) -> None:
    model = GraniteForCausalLM.from_pretrained(tiny.save(tiny.make(kind), tmp_path), device="cpu")
    theirs = engines.transformers_from(model)
    assert end_to_end.differs(theirs, engines.Ours(model), tiny.VOCAB, model.device) < 1e-4
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert theirs.theirs.model.norm.weight.data_ptr() in shared
    assert theirs.weight_bytes == model.memory().weights
    assert len(theirs.run(tiny.prompts(2, 5), 3)) == 3


@pytest.mark.filterwarnings("ignore:.* runs on .*")
@pytest.mark.parametrize("implementation", [OURS, engines.TRANSFORMERS, engines.ACCELERATED, engines.FAST_DECODE])
def test_each_test_is_a_row_with_its_figures(folder: Path, implementation: str) -> None:
    rows = rows_of(folder, implementation)
    assert [(row["test"], row["batch"], row["context"]) for row in rows] == [(t.name, t.batch, t.context) for t in TESTS]
    assert {(row["test"], row["batch"]) for row in rows} == {("pp32", 1), ("pp32", 2), ("tg5", 1), ("tg5", 2)}
    for row in rows:
        assert row["status"] == "ok" and row["format"] == "float32" and row["disagreement"] < 1e-4, row
        assert row["tokens_per_second"] > 0 and row["deviation"] >= 0 and row["ttft_ms"] > 0 and row["peak_allocated"] > 10**7
        assert ("tpot_p50_ms" in row) == ("mbu" in row) == row["test"].startswith("tg")
        if "mbu" in row:
            assert row["tpot_p50_ms"] <= row["tpot_p90_ms"] <= row["tpot_p99_ms"] and row["mbu"] == pytest.approx(row["gbps"] / 10)


def test_a_wrong_model_is_refused_before_it_is_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engines.unfused

    def swapped(model: GraniteForCausalLM) -> dict[str, torch.Tensor]:
        state = right(model)
        q = "model.layers.0.self_attn.q_proj.weight"
        return {**state, q: state[q].flip(0)}

    monkeypatch.setattr(engines, "unfused", swapped)
    monkeypatch.setattr(end_to_end, "measure", lambda *_: pytest.fail("timed"))
    (row,) = rows_of(folder, engines.TRANSFORMERS)
    assert row["status"] == "refused" and "wrong, so not timed" in row["note"]


def test_what_is_too_large_or_too_long_is_left_out_and_said(folder: Path) -> None:
    beyond = end_to_end.plan((), 5, (4096,), (1,))
    (row,) = rows_of(folder, OURS, beyond)
    assert row["status"] == "left out" and row["note"] == "the model's context is 2048"
    rows = rows_of(folder, OURS, seconds=-1)
    assert {(row["status"], row["note"][:31]) for row in rows} == {("left out", "the time of this run is up; --m")}
    (row,) = rows_of(folder, OURS, options={"device": "cpu", "quantization": "q9"})
    assert row["status"] == "left out" and "q9" in row["note"]


def test_sizes_are_chosen_for_the_device() -> None:
    quick = run.Plan("demo", quick=True).filled(on_gpu=False)
    assert quick.minutes is not None and quick.minutes < 1 and engines.STATIC not in quick.implementations
    full = run.Plan("demo", batches=(2,)).filled(on_gpu=True)
    assert full.batches == (2,) and full.contexts[-1] == 131072 and full.prompts == (512, 2048) and full.generated == 128
    here = run.Plan("demo").filled(on_gpu=False)
    assert here.minutes is not None and here.minutes < 5


def test_start_up_is_told_apart(folder: Path) -> None:
    (row,) = startup.run(
        implementation=OURS, model=str(folder), label="tiny", options={"device": "cpu"}, cache="none needed", begun=time.time() - 1
    )
    assert row["import_s"] >= 1 and row["load_s"] > 0 and 0 < row["first_token_s"] <= row["first_request_s"] and row["total_s"] > 1


# ------------------------------------------------------------------ processes

CHILD = """
import sys, time
def turning(upto):
    for number in range(upto):
        yield {"kind": "turn"}
        yield {"begun": time.monotonic()}
        time.sleep(0.2)
        yield {"ended": time.monotonic()}
def counting(upto):
    for number in range(upto):
        yield {"number": number}
def failing(upto):
    yield from counting(upto)
    raise ValueError("broken on purpose")
def endless(upto):
    yield from counting(upto)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("entry", "status", "note"),
    [("counting", None, ""), ("failing", "error", "ValueError: broken on purpose"), ("endless", "left out", "stopped after")],
)
def test_a_process_keeps_the_rows_it_made(tmp_path: Path, entry: str, status: str | None, note: str) -> None:
    file = tmp_path / "entries.py"
    file.write_text(CHILD)
    begun = time.monotonic()
    rows = list(stream(f"{file}:{entry}", {"upto": 2}, timeout=3 if entry == "endless" else 60, failed={"number": -1}))
    assert rows[:2] == [{"number": 0}, {"number": 1}] and time.monotonic() - begun < 40
    if status is None:
        assert len(rows) == 2
    else:
        assert rows[2]["status"] == status and rows[2]["note"].startswith(note)


def test_processes_take_turns_and_waiting_costs_them_no_time(tmp_path: Path) -> None:
    file = tmp_path / "entries.py"
    file.write_text(CHILD)
    both = [stream(f"{file}:turning", {"upto": 3}, timeout=30, failed={"kind": name}) for name in ("a", "b")]
    rows = list(in_turns(both))
    assert [next(iter(row)) for row in rows] == ["begun", "ended"] * 6  # nobody works while another one does
    ends = [(a["begun"], b["ended"]) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends))


def test_engines_take_turns_where_all_of_them_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [(OURS, ""), (engines.TRANSFORMERS, ""), (engines.STATIC, "")]
    monkeypatch.setattr(run, "available", lambda device: 100)
    assert run.together(jobs, 20) == [jobs[:2], jobs[2:]]
    assert run.together(jobs, 21) == [[job] for job in jobs]
    monkeypatch.setattr(run, "fits", lambda need, device: False)
    monkeypatch.setattr(run, "measure_roof", lambda *_, **__: Roof(1, 1, 1))
    monkeypatch.setattr(run, "_speed", lambda *_: iter(()))
    rows = run.run(run.Plan("random:3.1-2b", device="cpu", quick=True))
    assert [row["note"][:12] for row in rows if row.get("implementation") == engines.TRANSFORMERS] == ["needs some 5"]


def test_llama_cpp_is_asked_by_its_own_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments: dict[str, Any] = dict(repeats=2, on_gpu=False, threads=2, until=time.time() + 60)
    (row,) = llama_bench("model.gguf", "m", TESTS, **arguments)
    assert row["status"] == "absent" and row["implementation"] == LLAMA
    program = tmp_path / "llama-bench"
    answer = {"avg_ts": 12.5, "stddev_ts": 0.5, "model_type": "granite 3B Q8_0", "build_commit": "abc"}
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps([{answer!r} | {{'asked': sys.argv[1:]}}]))\n")
    program.chmod(0o755)
    rows = list(llama_bench("model.gguf", "m", TESTS, **arguments))
    assert [(row["test"], row["context"], row["tokens_per_second"]) for row in rows] == [
        ("pp32", 0, 12.5),
        ("tg5", 0, 12.5),
        ("tg5", 40, 12.5),
    ]
    (row,) = llama_bench("folder", "m", TESTS, **arguments)
    assert row["note"] == "llama.cpp reads GGUF files only"
    program.write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    assert {row["status"] for row in llama_bench("model.gguf", "m", TESTS, **arguments)} == {"error"}


@pytest.mark.slow
def test_bench_of_a_model_measures_everybody_and_writes_a_report(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "report" / "tiny.json"
    command = [sys.executable, "-m", "granite_kernels", "bench", str(folder), "--quick", "--json", str(path), "--report"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    found = {(row["implementation"], row["status"]) for row in rows if row["kind"] == "speed"}
    assert {(OURS, "ok"), (engines.TRANSFORMERS, "ok"), (LLAMA, "absent"), (OURS, "left out")} <= found
    assert "needs a GPU" in done.stdout and "End to end" in done.stdout and done.stderr == ""
    assert path.with_suffix(".md").exists() and path.with_name("tiny-speed.png").exists()


# ------------------------------------------------------------------ what would be unfair


class Recorded:
    """An engine that notes what it is asked for."""

    weight_bytes = 0

    def __init__(self, *, compiles: bool) -> None:
        self.compiles = compiles
        self.asked: list[tuple[int, int]] = []

    def run(self, ids: torch.Tensor, new: int) -> list[float]:
        self.asked.append((ids.shape[1], new))
        return [time.perf_counter() for _ in range(new)]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("measuring asks for no logits")


@pytest.mark.parametrize("compiles", [True, False])
def test_what_compiles_does_so_before_it_is_timed(compiles: bool) -> None:
    engine = Recorded(compiles=compiles)
    test = end_to_end.Test("tg8", 1, 100, 100, 9)
    clock = end_to_end.Clock(time.time() + 60, turns=True)
    measured = end_to_end.measure(engine, test, 2, 1000, Meters(torch.device("cpu")), end_to_end.Rates(), clock)
    assert [row["kind"] for row in measured] == ["turn"] * 2  # before each request that is timed, and not before the warm-up
    assert engine.asked[1:] == [(100, 9)] * 2
    assert (engine.asked[0] == (100, 9)) == compiles


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's peak can't begin anew, and memory_of says so")
def test_memory_is_that_of_the_test_and_not_of_what_was_loaded_before() -> None:
    meters = Meters(torch.device("cpu"))
    loaded = torch.ones(64 << 20)
    before = meters.memory()["peak_allocated"]
    del loaded
    meters.start()
    assert int(meters.memory()["peak_allocated"]) < int(before) - (128 << 20)
    assert meters.memory()["memory_of"] == "process"
