"""Compiled code: planted spills and narrow loads show, what doesn't fit is said, a whole step is put together."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from granite_kernels.bench.offline import cards, compiled, matrix, metrics, sass
from granite_kernels.bench.offline.examine import Case, Report, examine, repetitions
from granite_kernels.bench.offline.limits import broken, partial_sums
from granite_kernels.bench.offline.lines import weigher
from granite_kernels.bench.offline.roofline import Examined, bound
from granite_kernels.bench.offline.tables import COLUMNS, markdown, row

from granite_kernels.errors import GraniteError
from tests import offline_kernels as kernels

KERNELS = str(Path(kernels.__file__))

LISTING = """
.text.kernel:
        //## File "/a/kernel.py", line 7 inlined at "/a/kernel.py", line 20
        //## File "/a/kernel.py", line 20
        /*0000*/                   LDG.E.EF.128 R4, [R2.64] ;
.L_x_0:
        /*0010*/                   LDG.E.EF.128 R8, [R2.64+0x10] ;
        /*0020*/                   LDG.E.U16 R12, [R14.64] ;
        /*0030*/                   FFMA R20, R4, R12, R20 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   STL [R1], R20 ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1);
        /*0080*/                   NOP;
"""


def test_a_listing_is_read() -> None:
    code = sass.parse(LISTING)
    assert [instruction.stem for instruction in code.instructions] == ["LDG", "LDG", "LDG", "FFMA", "BRA", "STL", "EXIT"]
    assert code.instructions[0].line == ("kernel.py", 7)
    assert code.loops == (sass.Loop(1, 4),)
    assert sass.load_widths(code.instructions) == {128: 2, 16: 1}
    assert sass.load_bytes(code.body(code.loops[0]), streamed=True) == 16
    assert sass.pending_bytes(code.instructions[:4]) == 34
    assert sass.pending_bytes(code.instructions[:4], streamed=True) == 32
    # 16 bytes before the loop and 16 in each of 3 trips
    assert metrics.dynamic_instructions(code, 64) == (3 + 3 * 4, 3.0)


@pytest.fixture(scope="module")
def samples() -> dict[int, list[metrics.Metrics]]:
    launches = compiled(f"{KERNELS}:sample_launches", (80, 90, 120), streamed=("w_ptr",))
    assert len(launches) == 18
    return {arch: [launch for launch in launches if launch.arch == arch] for arch in (80, 90, 120)}


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_samples_compile_and_planted_faults_show(samples: dict[int, list[metrics.Metrics]], arch: int) -> None:
    good, narrow, spilling, tensor, again, custom_op = samples[arch]
    assert good.spills == 0
    assert good.grid == (256, 1, 1)
    assert set(good.streamed_widths) == {128}
    assert good.trips is None or good.trips == int(good.trips)
    assert 0.02 < (good.instructions_per_byte or 0) < 0.2
    assert good.streamed_in_flight >= 32 * 16
    assert narrow.streamed_widths.keys() == {16}
    assert spilling.spills > 0
    assert spilling.spill_bytes > 0
    assert sum(tensor.tensor_core.values()) > 0
    assert good.new
    assert not again.new
    assert again.hash == good.hash
    assert (custom_op.name, custom_op.grid) == ("add_one", (8, 1, 1))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(RuntimeError, match="shared memory"):
        compiled(f"{KERNELS}:too_much_shared_memory", (89,))


def test_occupancy() -> None:
    assert metrics.occupancy(registers=32, shared=0, warps=8, arch=90) == (8, 1.0, "warps")
    assert metrics.occupancy(registers=255, shared=0, warps=4, arch=90) == (2, 0.125, "registers")
    assert metrics.occupancy(registers=32, shared=100 * 1024, warps=4, arch=90) == (2, 0.125, "shared")


def test_cards() -> None:
    budgets = {card.name: card.issue_budget for card in cards.CARDS}
    expected = {"A100 80GB": 0.299, "H100 SXM": 0.277, "H200": 0.193, "B200": 0.137, "RTX 4090": 1.28, "L4": 1.58}
    assert {name: budgets[name] for name in expected} == pytest.approx(expected, rel=0.005)
    with pytest.raises(ValueError, match="sm_75"):
        cards.cards_of(75)


@pytest.fixture(scope="module")
def report() -> Report:
    return examine(Case("sample", "none", 1, 2), 90, layers=5, entry=f"{KERNELS}:sample_step")


def test_a_step_is_examined(report: Report) -> None:
    assert [(launch.traffic.name, launch.times) for launch in report.launches] == [
        ("add_one", 1),
        ("matrix_vector", 5),
        ("add_one", 5),
        ("last_program_sums", 1),
    ]
    assert report.count == 12
    matrix = report.launches[1]
    assert matrix.traffic.traced < matrix.traffic.programs == 250
    assert matrix.traffic.streamed == 1000 * 1024 * 2
    assert matrix.traffic.stream_readers == 1
    assert report.launches[3].traffic.traced == 16  # it has a ticket
    assert report.streamed == 5 * 1000 * 1024 * 2
    assert matrix.metrics.trips in (None, int(matrix.metrics.trips or 0))
    assert report.bytes == sum(launch.times * launch.traffic.dram for launch in report.launches)


def test_a_report_is_written(report: Report) -> None:
    record = json.loads(json.dumps(report.to_json()))
    assert record["total"]["launches"] == 12
    assert set(record["total"]["modelled_seconds"]) == {"H100 SXM", "H200"}
    text = markdown([report])
    assert text.count("\n| ") == 3 + len(report.launches)  # with two headers and the verdict
    assert "| - | - | - |" in text  # architectures that were not examined
    assert all(len(row(launch)) == len(COLUMNS) for launch in report.launches)
    assert "a model, not a measurement" in text


def test_bounds_say_what_binds(report: Report) -> None:
    launch, (h100, h200) = report.launches[1], cards.cards_of(90)
    dynamic = launch.metrics.dynamic_instructions
    assert dynamic is not None
    many = dataclasses.replace(launch.metrics, dynamic_instructions=100 * dynamic)
    idle = dataclasses.replace(launch.metrics, in_flight=16)
    ample = dataclasses.replace(launch.metrics, in_flight=1 << 20, dynamic_instructions=1)
    arguments = tuple(dataclasses.replace(argument, read=1000 * argument.read) for argument in launch.traffic.arguments)
    large = dataclasses.replace(launch.traffic, arguments=arguments)
    assert bound(launch.traffic, many, h100).by == "issue"
    assert bound(launch.traffic, idle, h100).by == "latency"
    assert bound(large, ample, h100).by == "dram"
    assert bound(large, ample, h200).modelled < bound(large, ample, h100).modelled


def faulty(launch: Examined, *, metrics: dict[str, Any] | None = None, argument: dict[str, int] | None = None) -> Examined:
    """`launch` with other metrics, and its first streamed argument with other counts."""
    first = next(given for given in launch.traffic.arguments if given.streamed)
    changed = tuple(dataclasses.replace(given, **(argument or {})) if given is first else given for given in launch.traffic.arguments)
    traffic = dataclasses.replace(launch.traffic, arguments=changed)
    return dataclasses.replace(launch, traffic=traffic, metrics=dataclasses.replace(launch.metrics, **(metrics or {})))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics": {"spills": 3}}, "3 spills"),
        ({"metrics": {"shared": 1 << 20}}, "bytes of shared memory"),
        ({"metrics": {"streamed_widths": {64: 8, 128: 2}}}, r"loads of \[64, 128\] bits"),
        ({"metrics": {"dynamic_instructions": 1000 * 1024}}, "instructions a byte, limit 0.080"),
        ({"metrics": {"in_flight": 16}}, r" 0\.0 KiB in flight"),
        ({"argument": {"programs_per_sector": 2}}, "goes to 2 programs"),
    ],
)
def test_broken_limits_are_said(report: Report, change: dict[str, Any], said: str) -> None:
    before = broken(report)
    launches = list(report.launches)
    launches[1] = faulty(launches[1], **change)
    after = broken(dataclasses.replace(report, launches=tuple(launches)))
    assert any(re.search(said, fault) for fault in after)
    assert not any(re.search(said, fault) for fault in before)


@pytest.mark.parametrize(
    ("format", "batch", "limit"), [("q8_0", 1, 0.12), ("q4_k", 1, 0.18), ("q3_k", 1, 0.25), ("int4_g64_zero", 16, 0.28)]
)
def test_packed_formats_have_limits_of_their_own(report: Report, format: str, batch: int, limit: float) -> None:
    case = dataclasses.replace(report.case, quantization=format, batch=batch)
    for share, faults in ((0.99, 0), (1.01, 1)):
        launch = report.launches[1]
        launch = faulty(launch, metrics={"dynamic_instructions": round(share * limit * launch.traffic.dram)})
        found = broken(dataclasses.replace(report, case=case, launches=(launch,)))
        assert len([fault for fault in found if "instructions a byte" in fault]) == faults, found


def test_limits_of_a_whole_step(report: Report) -> None:
    arguments = tuple(dataclasses.replace(x, name="partials_ptr", written=1 << 20) for x in report.launches[0].traffic.arguments)
    writing = dataclasses.replace(report.launches[0], traffic=dataclasses.replace(report.launches[0].traffic, arguments=arguments))
    spoilt = dataclasses.replace(report, launches=(writing, *report.launches[1:]), layers=1)
    assert partial_sums(report) == 0
    assert partial_sums(spoilt) > 0.02
    faults = " ".join(broken(spoilt))
    assert "partial sums are" in faults
    assert "12 launches, limit 5 a layer and 3" in faults


def test_cells_are_kept_while_their_sources_are_the_same(report: Report, tmp_path: Path) -> None:
    matrix.write({(report.case, report.arch): report}, tmp_path)
    file = tmp_path / "offline.json"
    (kept,) = matrix.known(file).values()
    assert kept == report
    file.write_text(file.read_text().replace('"sources":"', '"sources":"0'))
    assert matrix.known(file) == {}
    assert len({matrix.sources(format, preset) for format in ("none", "q4_k") for preset in ("3.1-2b", "3.1-1b-a400m")}) == 4


def test_instructions_count_as_often_as_their_lines_run() -> None:
    code = sass.parse(LISTING)
    assert code.instructions[0].lines == (("kernel.py", 7), ("kernel.py", 20))
    assert metrics.dynamic_instructions(code, 64, weigher([("kernel.py", 20, 0.25)])) == (0.25 * (3 + 3 * 4), 3.0)


def test_layers_that_differ_are_refused() -> None:
    assert repetitions("abcd", "abcbcd", 40) == [1, 40, 40, 1]
    assert repetitions("abc", "abcabc", 40) == [40, 40, 40]
    with pytest.raises(GraniteError, match="layers differ"):
        repetitions("abc", "abcd", 2)
