"""`make gpu` without a GPU: a run that is cut short and gone on with, and all that asks the device, over stand-ins for it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from granite_kernels.bench import end_to_end, gpu, kernels, machine, run, timing
from granite_kernels.bench.harness import COMPILED, OURS
from granite_kernels.bench.meters import Meters
from granite_kernels.bench.roof import Roof
from granite_kernels.bench.rows import Row, key, load
from granite_kernels.bench.shapes import Setting
from granite_kernels.model.config import GraniteConfig

SMALL: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, vocab_size=80, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
SMALL_CONFIG = dataclasses.replace(GraniteConfig.preset("3.1-2b"), **SMALL)
CARD = torch.device("cuda", 0)


def kernel(op: str) -> Row:
    about = {"kind": "kernel", "op": op, "size": "64", "tokens": 1, "format": "dense", "dtype": "bfloat16", "implementation": OURS}
    figures = {"median_us": 1.0, "p20_us": 1.0, "p80_us": 1.0, "gbps": 1.0, "tflops": 1.0, "roof_share": 0.5}
    return {**about, "status": "ok", **figures}


def test_a_run_that_was_cut_short_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, with stages of stand-in rows; each stage is told what is there already."""
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    told: list[set[str]] = []

    def stages(preset: str, device: str, done: Sequence[Row]) -> Iterator[tuple[str, float, Callable[[float], Iterable[Row]]]]:
        assert (preset, device) == ("3.1-2b", "cpu")

        def rows(*names: str, cut: bool = False) -> Iterator[Row]:
            known = {row["op"] for row in done if row["status"] == "ok"}
            told.append(known)
            yield from (kernel(name) for name in names if name not in known)
            if cut and len(told) < 3:
                raise KeyboardInterrupt

        def broken(minutes: float) -> Iterable[Row]:
            raise ValueError("a stage that fails")

        yield "first", 0.5, lambda minutes: rows("a", "b")
        yield "broken", 0.5, broken
        yield "second", 1.0, lambda minutes: rows("c", cut=True)

    monkeypatch.setattr(gpu, "stages", stages)
    arguments = ["--results", str(tmp_path), "--minutes", "0.5", "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        gpu.main(arguments)
    (path,) = tmp_path.glob("*.json")
    header, rows = load(path)
    assert [row.get("op") or row["note"] for row in rows] == ["a", "b", "ValueError: a stage that fails", "c"]
    assert header["commit"] == "abc" and header["others"] is not None and path.with_suffix(".md").exists()
    assert gpu.main(arguments) == 0
    assert "3 rows are there already" in capsys.readouterr().out
    assert told == [set(), {"a", "b"}, {"a", "b", "c"}, {"a", "b", "c"}] and len(load(path)[1]) == 4


def test_what_is_there_already_goes_to_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu, "run", lambda plan: plans.append(vars(plan)) or [])
    monkeypatch.setattr(kernels, "run", lambda **keywords: plans.append(keywords) or [])
    done = [kernel("a"), {**kernel("b"), "status": "error"}]
    shares = [share for _, share, rows in gpu.stages("3.1-2b", "cuda:0", done) if list(rows(2.0)) == []]
    assert len(plans) == 4 and shares[-1] == 1.0
    for plan in plans:
        assert (plan["device"], plan["minutes"], plan["done"]) == ("cuda:0", 2.0, (key(done[0]),))


def test_kernels_and_requests_that_are_there_already_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(SMALL_CONFIG, 1, 40, "dense", torch.device("cpu"), torch.float32)

    def rows(done: Iterable[Row]) -> list[Row]:
        left = {OURS: "", COMPILED: ""}
        keys = frozenset(map(key, done))
        return list(kernels.run_setting("norm", setting, (), Roof(1e10, 2e10, 1e11), left, math.inf, 0.001, first=True, done=keys))

    measured = rows([])
    assert {row["op"] for row in rows(row for row in measured if row["op"] == "rms_norm")} == {"add_rms_norm"}
    assert rows(measured) == []

    tests = end_to_end.plan((512,), 128, (0, 1024), (1,))
    speed = {"kind": "speed", "model": "random:3.1-2b", "implementation": OURS, "format": "bfloat16", "test": "tg128", "batch": 1}
    plan = run.Plan("random:3.1-2b", done=(key({**speed, "context": 1024}),))
    assert [run._known(plan, OURS, "", test) for test in tests] == [test.context == 1024 for test in tests]
    assert not any(run._known(plan, OURS, "q8_0", test) for test in tests)


def test_a_file_of_another_commit_is_begun_anew(tmp_path: Path) -> None:
    about = {"device": "A card", "commit": "abc", "versions": {"torch": "2"}}
    path = tmp_path / "a-card.json"
    row = {"kind": "roof", "what": "copy", "status": "ok", "gbps": 1.0}
    path.write_text(json.dumps({"header": about, "rows": [row, {**row, "what": "read", "status": "error"}]}))
    assert gpu.earlier(path, about) == [row]
    assert gpu.earlier(path, {**about, "commit": "def"}) == [] == gpu.earlier(tmp_path / "none.json", about)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("no GPU") and error.count("\n") == 1


# ------------------------------------------------------------------ what asks the device


class Event:
    """A moment on a device whose clock goes on by 1 ms a recording."""

    now = 0.0

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        Event.now += 1.0
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at


def test_time_on_a_gpu_is_that_of_a_captured_rotation_or_says_what_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import testing

    calls: list[int] = []

    def captured(rotation: Callable[[], None], *, rep: int, return_mode: str) -> list[float]:
        rotation()
        assert return_mode == "all" and rep == 30
        return [6.0, 3.0, 9.0]

    monkeypatch.setattr(testing, "do_bench_cudagraph", captured)
    found = timing.time_on_gpu(calls.append, 3, 0.3)
    assert calls == [0, 1, 2] and found.median == pytest.approx(2e-3) and found.method == "CUDA graph over 3 copies"

    def refused(*_: Any, **__: Any) -> list[float]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(testing, "do_bench_cudagraph", refused)
    monkeypatch.setattr(testing, "do_bench", lambda once, **_: [once() or 4.0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    found = timing.time_on_gpu(calls.append, 3, 0.3)
    assert calls[3:] == [0] and found.median == pytest.approx(4e-3) and "from the host" in found.method


def test_a_rotation_is_larger_than_three_times_the_last_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    l2 = 50 << 20
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(L2_cache_size=l2))
    for moved in (1 << 20, 2_100_000, 8 << 20, 201 << 20):  # attention at 1K, a projection, the head of a 2B model
        assert timing.copies_of(moved, moved, CARD) * moved >= 3 * l2
    assert timing.copies_of(4096, 4096, CARD) == timing.MOST_COPIES
    assert timing.copies_of(1 << 20, 4 << 30, CARD) == 2  # as many as memory leaves


def test_the_clock_of_a_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    read = timing.cuda_clock()
    first = read()
    assert read() - first == pytest.approx(1e-3)


def test_a_card_is_described_with_its_driver_and_clocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20, uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: told)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint('570.1, 1980 MHz, 2619 MHz, 345 MHz, 2619 MHz, 700.00 W, 31, Disabled')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    header = machine.header(CARD)
    facts = header["gpu"]
    assert (header["kind"], machine.slug(header["device"])) == ("gpu", "nvidia-h100-80gb-hbm3")
    assert (facts["compute_capability"], facts["driver_version"], facts["power.limit"]) == ("9.0", "570.1", "700.00 W")


def test_memory_and_energy_are_the_cards_own(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = ModuleType("pynvml")
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"GPU-1-2": 2500}[handle]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(uuid="1-2"))
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: 20)
    meters = Meters(CARD)
    meters.start()
    assert reset == [CARD] and meters.joules() == 2.5
    assert meters.memory() == {"peak_allocated": 10, "peak_reserved": 20}
