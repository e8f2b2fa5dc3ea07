"""The benchmarks themselves: wrong kernels are refused, costs are the kernels' own, regressions are marked, rows survive."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from granite_kernels.bench import compare, kernels, report
from granite_kernels.bench.harness import COMPILED, EAGER, OURS, Case, Rival, measure
from granite_kernels.bench.roof import Roof
from granite_kernels.bench.rows import Recorder, Row, key, load, save, to_csv
from granite_kernels.bench.shapes import SCALES, Setting, step_bytes
from granite_kernels.model.cli import guarded
from granite_kernels.model.cli import main as command_line
from granite_kernels.model.config import GraniteConfig

from granite_kernels.errors import GraniteError
from granite_kernels.kernels.norm import _cost as norm_cost
from granite_kernels.linear.operations import _cost as linear_cost
from granite_kernels.weight import dense_matrix

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, vocab_size=80, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
SMALL_CONFIG = dataclasses.replace(GraniteConfig.preset("3.1-2b"), **SMALL)
SMALL_MIXTURE = dataclasses.replace(GraniteConfig.preset("3.1-1b-a400m"), **SMALL)
ROOF = Roof(1e10, 2e10, 1e11)


def setting(tokens: int = 1, config: GraniteConfig = SMALL_CONFIG) -> Setting:
    return Setting(config, tokens, 40, "dense", CPU, torch.float32)


def case_of(file: str, op: str, tokens: int = 1) -> Case:
    return next(case for case in kernels.cases(file, setting(tokens)) if case.op == op)


def rows_of(case: Case, **leave_out: str) -> dict[str, Row]:
    left = {COMPILED: "takes long"} | leave_out
    return {row["implementation"]: row for row in measure(case, ROOF, budget=0.001, leave_out=left)}


# ------------------------------------------------------------------ verify, then time


def test_a_right_kernel_is_timed_and_a_wrong_one_refused_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("norm", "rms_norm")
    right = rows_of(case)[OURS]
    assert right["status"] == "ok" and right["median_us"] > 0 and right["error"] <= right["error_limit"]
    calls = []

    def wrong(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
        calls.append(1)
        return case.reference(x, weight, eps=eps) * (1 + 2**-12)

    monkeypatch.setattr("granite_kernels.kernels.norm.rms_norm", wrong)
    rows = rows_of(case)
    assert rows[OURS]["status"] == "refused" and "median_us" not in rows[OURS] and len(calls) == 1
    assert rows[EAGER]["status"] == "ok"


def test_a_cache_that_was_not_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("rope", "rope_append")

    def forgetful(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
        *others, k_cache, v_cache = places
        return case.reference(q, k, v, *others, k_cache.clone(), v_cache)

    monkeypatch.setattr("granite_kernels.kernels.rope.rope_append", forgetful)
    assert rows_of(case)[OURS]["status"] == "refused"


def test_rivals_that_are_absent_wrong_or_broken_are_rows_and_stop_nobody() -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel image\nand more")

    rivals = (Rival("broken", lambda: broken), Rival("wrong", lambda: lambda x, weight, eps: x), *case_of("norm", "rms_norm").rivals)
    rows = rows_of(dataclasses.replace(case_of("norm", "rms_norm"), rivals=rivals), **{OURS: "not asked for"})
    assert {name: row["status"] for name, row in rows.items()} == {
        OURS: "left out",
        EAGER: "ok",
        COMPILED: "left out",
        "broken": "error",
        "wrong": "refused",
        "F.rms_norm": "ok",
        "Liger": "absent",
    }
    assert rows["broken"]["note"] == "RuntimeError: no kernel image"


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("config", [SMALL_CONFIG, SMALL_MIXTURE], ids=["dense", "mixture"])
def test_every_operation_has_cases_that_agree_with_the_reference(config: GraniteConfig, tokens: int) -> None:
    seen = set()
    for file in kernels.FILES:
        for row in kernels.run_setting(file, setting(tokens, config), (), ROOF, {OURS: "", COMPILED: ""}, math.inf, 0.001, first=True):
            assert row["status"] in ("ok", "absent", "left out"), row
            seen.add(row["op"])
            if row["status"] == "ok":
                assert row["gbps"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3) and row["bytes"] > 0
    assert {"rms_norm", "swiglu", "rope_append", "embed", "linear_add", "norm_qkv_rope_append"} <= seen
    assert ("experts_down_add" in seen) == config.is_moe and ("attention" in seen) == (tokens > 16)


def test_costs_are_those_that_the_kernels_tell_the_profiler() -> None:
    class Kernel:
        name = "_norm_gate_up_swiglu_kernel"

    case = case_of("linear", "norm_gate_up_swiglu", tokens=2)
    x, _, weight = case.inputs.args
    arguments = {
        "x_ptr": x,
        "norm_ptr": x,
        "SHAPE": SimpleNamespace(columns=64),
        "planes": weight.parts[0].planes,
        "tokens": 2,
        "rows": weight.shape[0],
        "NORM": 1,
    }
    told = linear_cost(None, Kernel, arguments)
    assert case.cost.flops == told["flops"]
    assert case.cost.bytes == pytest.approx(told["bytes"], rel=0.02)
    norm = case_of("norm", "add_rms_norm", tokens=2)
    told = norm_cost(None, Kernel, {"x_ptr": norm.inputs.args[0], "residual_ptr": x, "rows": 2, "hidden": 64})
    assert norm.cost.bytes == told["bytes"]


def test_bytes_of_a_step() -> None:
    dense, mixture = GraniteConfig.preset("3.1-2b"), GraniteConfig.preset("3.1-1b-a400m")
    stored = 2 * dense.parameters()
    assert step_bytes(dense, stored, torch.bfloat16, 1024) == stored + 1024 * 81920  # performance.md's 80 KiB a token
    assert step_bytes(dense, stored, torch.bfloat16, 10, batch=4) == stored + 40 * 81920
    one, all_of_them = (step_bytes(mixture, 2 * mixture.parameters(), torch.bfloat16, 0, batch) for batch in (1, 4096))
    assert one == pytest.approx(2 * mixture.active_parameters())
    assert all_of_them == pytest.approx(2 * mixture.parameters())


# ------------------------------------------------------------------ rows and reports


def speed(implementation: str, tokens_per_second: float, deviation: float, **more: Any) -> Row:
    about = {"kind": "speed", "model": "demo", "format": "float32", "test": "tg16", "batch": 1, "context": 0, "status": "ok"}
    figures = {"tokens_per_second": tokens_per_second, "deviation": deviation, "peak_allocated": 10**9, "ttft_ms": 5.0}
    return {**about, "implementation": implementation, **figures, **more}


def kernel(op: str, median: float, **more: Any) -> Row:
    about = {"kind": "kernel", "op": op, "size": "64", "tokens": 1, "format": "dense", "dtype": "float32", "implementation": OURS}
    times = {"median_us": median, "p20_us": 0.98 * median, "p80_us": 1.02 * median, "gbps": 10.0, "tflops": 0.1, "roof_share": 0.5}
    return {**about, "status": "ok", "role": op, "times": 2, "bytes": 10, "flops": 20, "bound": "memory", **times, **more}


ROWS = [
    {"kind": "roof", "what": "copy", "status": "ok", "gbps": 100.0},
    {"kind": "roof", "what": "read", "status": "ok", "gbps": 90.0},
    {"kind": "roof", "what": "matmul float32", "status": "ok", "tflops": 1.0},
    speed(OURS, 20.0, 0.2, tpot_p50_ms=50.0, mbu=0.5),
    speed("transformers eager", 10.0, 3.0, context=1024),
    {**speed("llama.cpp", 0, 0), "status": "absent", "note": "llama-bench is not on the PATH", "test": "all", "batch": None},
    kernel("qkv", 30.0),
    kernel("gate_up", 60.0),
    kernel("down", 40.0, implementation=EAGER),
    kernel("down", 50.0),
]
HEADER = {
    "device": "A device",
    "kind": "cpu",
    "cpu": "A processor",
    "cores": 2,
    "threads": 2,
    "load": 0.5,
    "versions": {"torch": "2", "transformers": "5"},
    "commit": "abc",
    "date": "2026-11-24 12:00 UTC",
    "method": "As written.",
}


def test_a_planted_regression_is_marked_and_noise_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = copy.deepcopy(ROWS)
    slower[3]["tokens_per_second"] *= 0.9
    slower[4]["tokens_per_second"] *= 0.9  # its deviation is 30 %
    for name in ("median_us", "p20_us", "p80_us"):
        slower[7][name] *= 1.1
    slower[6]["median_us"] *= 1.01
    verdicts = {change.key[1:3]: change.verdict for change in compare.compare(ROWS, slower) if change.before.name != "peak_allocated"}
    assert verdicts[("demo", OURS)] == "worse" and verdicts[("gate_up", "64")] == "worse"
    assert verdicts[("demo", "transformers eager")] == "slower?" and verdicts[("qkv", "64")] == "same"
    assert {change.verdict for change in compare.compare(slower, ROWS)} == {"better", "noisy", "same"}
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path, rows in zip(paths, (ROWS, slower), strict=True):
        save(path, HEADER, rows)
    with pytest.raises(SystemExit) as raised:
        command_line(["bench", "compare", *map(str, paths)])
    out = capsys.readouterr().out
    assert raised.value.code == 1 and "gate_up" in out and "2 worse" in out and "1 slower?" in out
    with pytest.raises(SystemExit) as raised:
        command_line(["bench", "compare", str(paths[0]), str(paths[0])])
    assert raised.value.code == 0


def test_a_row_that_the_second_run_lost_is_a_regression() -> None:
    changes = compare.compare(ROWS, ROWS[:-1])
    assert [change.verdict for change in changes if change.key == key(ROWS[-1])] == ["missing"] and compare.regressed(changes)


def test_another_device_or_version_is_told() -> None:
    other = {**HEADER, "device": "Another", "versions": {"torch": "3", "transformers": "5"}}
    assert compare.differences(HEADER, other) == ["device: A device and Another", "torch: 2 and 3"]


def test_markdown_csv_and_pictures_come_from_the_same_rows(tmp_path: Path) -> None:
    source = tmp_path / "device.json"
    save(source, HEADER, ROWS)
    assert load(source) == (HEADER, ROWS)
    written = {path.name for path in report.write(source)}
    assert written == {"device.md", "device.csv", *(f"device-{name}.png" for name in ("speed", "roofline", "memory", "step"))}
    page = (tmp_path / "device.md").read_text()
    for piece in (
        "20.00 ± 0.20",
        "tg16 @ d1024",
        "60.0 [58.8-61.2]",
        "llama.cpp, absent: llama-bench is not on the PATH",
        "100.0 GB/s",
        "abc",
    ):
        assert piece in page, piece
    assert len((tmp_path / "device.csv").read_text().splitlines()) == 1 + len(ROWS)
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))
    assert to_csv(ROWS).splitlines()[0].startswith("kind,what,status")


def test_attention_is_measured_at_every_context_that_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SLOTS", {"cpu": 80})
    monkeypatch.setattr(kernels, "measure", lambda case, *_, **__: [case.row(EAGER, "ok")])
    arguments: dict[str, Any] = dict(preset="3.1-2b", ops=(), formats=("none",), contexts=(20, 40, 80), dtype="float32", device="cpu")
    monkeypatch.setattr(GraniteConfig, "preset", lambda name: SMALL_CONFIG)
    for file, wanted in (("attention_decode", [(1, 20), (1, 40), (1, 80), (8, 20)]), ("rope", [(1, 0), (8, 0)])):
        rows = list(kernels.run_file(file=file, tokens=(1, 8), quick=False, roof=(1, 1, 1), until=math.inf, **arguments))
        slots = [int(row["size"].split()[-2]) if file == "attention_decode" else 0 for row in rows]
        assert list(zip((row["tokens"] for row in rows), slots, strict=True)) == wanted


@pytest.mark.parametrize("format", sorted(SCALES))
def test_formats_that_nothing_quantizes_to_have_finite_random_weights(format: str) -> None:
    weight = dataclasses.replace(setting(), format=format).weight(8, 256)
    values = dense_matrix(weight.parts[0], torch.float32)
    assert values.isfinite().all() and 0.001 < values.std() < 1


def test_the_readme_is_what_the_committed_results_say() -> None:
    page = (ROOT / "README.md").read_text()
    assert report.between_markers(page, "measured", report.readme_block(report.committed())) == page
    assert "| granite-kernels | float32 | 1 | tg16 | 20.0 ± 0.2 |" in report.readme_block([(HEADER, ROWS)])
    with pytest.raises(GraniteError, match="markers"):
        report.between_markers("no tables here", "measured", "")


def test_a_file_that_is_no_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(GraniteError, match="no such file"):
        load(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(GraniteError, match="expected a benchmark report"):
        load(tmp_path / "list.json")


def test_rows_are_on_disk_as_they_come_and_stay_after_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from granite_kernels.bench.cli import record

    path = tmp_path / "cut.json"

    def interrupted() -> Iterator[Row]:
        yield ROWS[0]
        yield ROWS[3]
        assert len(load(path)[1]) == 2
        raise KeyboardInterrupt

    assert guarded(lambda: record(interrupted(), "cpu", path, report=True)) == 130
    assert [key(row) for row in load(path)[1]] == [key(ROWS[0]), key(ROWS[3])]
    assert "20.00 ± 0.20" in capsys.readouterr().out and path.with_suffix(".md").exists()


def test_a_measurement_replaces_the_row_that_had_none() -> None:
    recorder = Recorder(HEADER)
    recorder.take([{**ROWS[3], "status": "left out"}, ROWS[4], ROWS[3], {**ROWS[3], "status": "error"}])
    assert recorder.rows == [ROWS[3], ROWS[4]]


# ------------------------------------------------------------------ the command line


def test_unknown_names_are_told_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["bench", "kernels", "--op", "softmax"], "there is no operation 'softmax'"),
        (["bench", "kernels", "--dtype", "int3"], "expected float32"),
        (["bench", "kernels", "--preset", "4.0"], "4.0"),
        (["bench", "./nowhere.gguf"], "nowhere.gguf"),
        (["bench", "--quick", "random:5"], "5"),
        (["bench", "demo", "--implementation", "vllm"], "expected a part of"),
        (["bench", "kernels", "--report"], "--json"),
    ):
        with pytest.raises(SystemExit) as raised:
            command_line(arguments)
        error = capsys.readouterr().err
        assert raised.value.code == 2 and said in error and error.count("\n") == 1, error


def test_kernels_quick_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraniteConfig, "preset", lambda name: SMALL_CONFIG)
    path = tmp_path / "kernels.json"
    with pytest.raises(SystemExit) as raised:
        command_line(["bench", "kernels", "--op", "swiglu", "--op", "embed", "--quick", "--device", "cpu", "--json", str(path)])
    assert raised.value.code == 0
    header, rows = load(path)
    assert {row["op"] for row in rows if row["kind"] == "kernel"} == {"swiglu", "embed"}
    assert header["device"] and header["versions"]["torch"] == torch.__version__
    assert "Roof, measured in this run" in capsys.readouterr().out
    assert json.loads(path.read_text())["header"]["date"]
