"""The laboratory itself: repaired arithmetic against PyTorch, planted faults that must be found, metrics of compiled samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from granite_kernels.bench.offline import cards, compiled, metrics, ptx, sampling, sass
from granite_kernels.bench.offline.examine import Case, Report, examine, repetitions
from granite_kernels.bench.offline.requested import Launch, Selection
from granite_kernels.bench.offline.roofline import bound
from granite_kernels.bench.offline.tables import COLUMNS, markdown, row
from granite_kernels.bench.offline.traffic import TraceError, trace
from torch import Tensor

from granite_kernels.errors import GraniteError
from tests import offline_kernels as kernels

KERNELS = str(Path(kernels.__file__))
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- arithmetic of the interpreter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_elementwise_arithmetic_is_torchs(dtype: torch.dtype) -> None:
    x, y = torch.randn(256).to(dtype), torch.randn(256).to(dtype)
    outputs = [torch.empty_like(x) for _ in range(5)]
    kernels.arithmetic[(1,)](x, y, *outputs, SIZE=256)
    fused = (x.double() * y.double() + x.double()).float().to(dtype)
    for actual, expected in zip(outputs, (x + y, x - y, x * y, torch.maximum(x, y), fused), strict=True):
        assert torch.equal(actual, expected) or (dtype == torch.float16 and actual is outputs[4])


def test_constants_of_bfloat16() -> None:
    x, y = torch.randn(128).to(BF16), torch.empty(128, dtype=BF16)
    kernels.add_one[(1,)](x, y, 128, BLOCK=128)
    assert torch.equal(y, x + 1)


def test_reductions_of_bfloat16_round_once() -> None:
    x, y = torch.randn(512).to(BF16), torch.empty(2, dtype=BF16)
    kernels.reduce[(1,)](x, y, SIZE=512)
    assert torch.equal(y, torch.stack([x.float().sum().to(BF16), x.max()]))


def test_casts_to_bfloat16_round_to_nearest_even() -> None:
    x = torch.randn(1024)
    x.view(torch.int32)[:512] = x.view(torch.int32)[:512] & ~0xFFFF | 0x8000  # ties
    x[:6] = torch.tensor([float("inf"), float("-inf"), 1e-40, 3.4e38, 0.0, -0.0])
    y = torch.empty(1024, dtype=BF16)
    kernels.cast[(1,)](x, y, SIZE=1024)
    assert torch.equal(y.view(torch.int16), x.to(BF16).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_to_float8_round_and_saturate(dtype: torch.dtype) -> None:
    x = torch.randn(256) * 100
    x[:2] = torch.tensor([1e6, -1e6])
    y = torch.empty(256, dtype=dtype)
    kernels.cast[(1,)](x, y, SIZE=256)
    largest = torch.finfo(dtype).max
    assert torch.equal(y.float(), x.clamp(-largest, largest).to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dot(dtype: torch.dtype) -> None:
    a, b, y = torch.randn(16, 128).to(dtype), torch.randn(128, 32).to(dtype), torch.empty(16, 32)
    kernels.product[(1,)](a, b, y, M=16, N=32, K=128)
    torch.testing.assert_close(y, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-4)


def test_assembly_is_executed() -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32)
    low, high = torch.empty(64, dtype=BF16), torch.empty(64, dtype=BF16)
    kernels.decode_nibbles[(1,)](words, low, high, SIZE=64)
    assert torch.equal(low, (words & 15).to(BF16))
    assert torch.equal(high, (words >> 16 & 15).to(BF16))


def test_dot_of_bytes_and_a_prefetch() -> None:
    a, b, c = (torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32) >> shift for shift in (0, 0, 8))
    y = torch.empty(64, dtype=torch.int32)
    kernels.dot_of_bytes[(1,)](a, b, c, y, SIZE=64)
    expected = c + (a.view(torch.uint8).int() * b.view(torch.int8).int()).view(64, 4).sum(1)
    assert torch.equal(y, expected.int())


def bits(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


@pytest.mark.parametrize(
    ("text", "operands", "expected"),
    [
        ("lop3.b32 $0, $1, $2, $3, 0xEA;", (0b1100, 0b1010, 0b0001), 0b1001),  # (a & b) | c
        ("prmt.b32 $0, $1, $2, 0x9410;", (0x44332281, 0x887766F5), 0x00F52281),  # bytes 0, 1, 4 and the sign of byte 1
        ("shr.s32 $0, $1, 4;", (0x80000000,), 0xF8000000),
        ("shr.u32 $0, $1, 4;", (0x80000000,), 0x08000000),
        ("shl.b32 $0, $1, 32;", (1,), 0),
        ("mad.lo.s32 $0, $1, $2, $3;", (0xFFFFFFFF, 3, 1), 0xFFFFFFFE),
        ("cvt.rn.f32.s32 $0, $1;", (0xFFFFFFFF,), 0xBF800000),
        ("cvt.rni.s32.f32 $0, $1;", (0x40200000,), 2),  # 2.5
        ("cvt.rn.bf16x2.f32 $0, $1, $2;", (0x3F800000, 0x40000000), 0x3F804000),
        ("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; mov.b32 $0, {hi, lo}; }", (0x12345678,), 0x56781234),
        ("fma.rn.f16x2 $0, $1, $2, $3;", (0x3C004000, 0x40004200, 0x3C003C00), 0x42004700),
        ("ex2.approx.ftz.f32 $0, $1;", (0x40400000,), 0x41000000),
    ],
)
def test_ptx(text: str, operands: tuple[int, ...], expected: int) -> None:
    (result,) = ptx.evaluate(text, 1, [bits(operand) for operand in operands])
    assert int(result[0]) == expected, f"{int(result[0]):#x}"


def test_unknown_assembly_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="vote"):
        ptx.evaluate("vote.sync.all.pred $0, $1, $2;", 1, [bits(1), bits(1)])


# ---------------------------------------------------------------------------------------------- strays, races, barriers


def on_tiles(kernel: object, **options: object) -> Callable[[], Tensor]:
    """Launch a kernel (x, y) on eight tiles of 64."""

    def run() -> Tensor:
        y = torch.zeros(512)
        kernel[(8,)](torch.arange(512.0), y, BLOCK=64, **options)  # type: ignore[index]  # a JITFunction or its interpreted twin
        return y

    return run


def masked(kernel: object) -> Callable[[], Tensor]:
    def run() -> Tensor:
        y = torch.zeros(1000)
        kernel[(8,)](torch.arange(1000.0), y, 1000, BLOCK=128)  # type: ignore[index]
        return y

    return run


def shift() -> Tensor:
    x = torch.arange(512.0)
    kernels.shifts_in_place[(8,)](x, 512, BLOCK=64)
    return x


def ticket(order: str, barrier: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        y = torch.zeros(1)
        scratch, tickets = torch.empty(512), torch.zeros(1, dtype=torch.int32)
        kernels.last_program_sums[(8,)](torch.ones(512), scratch, tickets, y, BLOCK=64, PROGRAMS=8, ORDER=order, BARRIER=barrier)
        return y

    return run


def reverse(barrier: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        y = torch.zeros(512)
        kernels.reverses_through_memory[(8,)](torch.arange(512.0), torch.empty(512), y, BLOCK=64, BARRIER=barrier)
        return y

    return run


def pairs(same: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        y = torch.zeros(32)
        kernels.stores_pairs_of_lanes[(1,)](y, BLOCK=64, SAME=same)
        return y

    return run


FAULTS = {
    "a load past the end": (masked(kernels.reads_past_the_end), "OOB"),
    "a sum without atomics": (on_tiles(kernels.sums_without_atomics), "RACE"),
    "overlapping tiles": (on_tiles(kernels.writes_overlapping_tiles), "RACE"),
    "a neighbour's tile read in place": (shift, "RACE"),
    "a ticket without order": (ticket("relaxed", True), "RACE"),
    "a ticket without a barrier": (ticket("acq_rel", False), "BARRIER"),
    "own stores read without a barrier": (reverse(False), "BARRIER"),
    "lanes that disagree": (pairs(False), "DUP"),
}
CLEAN = {
    "masked": masked(kernels.add_one),
    "atomics": on_tiles(kernels.sums_by_atomics),
    "a ticket": ticket("acq_rel", True),
    "a barrier": reverse(True),
    "lanes that agree": pairs(True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    run, kind = FAULTS[fault]
    with trace() as traced:
        run()
    assert {problem.split(": ")[1] for problem in traced.problems} == {kind}, traced.problems
    assert "offline_kernels.py:" in traced.problems[0]
    with pytest.raises(TraceError, match=kind), trace(strict=True):
        run()


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("case", CLEAN)
def test_clean_kernels_are_clean(case: str, order: str) -> None:
    expected = CLEAN[case]()
    with trace(order=order) as traced:
        actual = CLEAN[case]()
    assert not traced.problems
    assert torch.equal(actual, expected)


def test_the_order_of_programs_is_the_one_asked_for() -> None:
    results = []
    for order in ("forward", "reverse"):
        with trace(race=False, order=order):
            results.append(on_tiles(kernels.writes_overlapping_tiles)())
    assert not torch.equal(*results)


def test_straying_into_another_argument_is_stray() -> None:
    both = torch.zeros(2048)
    with trace() as traced:
        kernels.reads_past_the_end[(8,)](both[:1000], both[1000:2000], 1000, BLOCK=128)
    assert any("read of 1 lanes, the first +4000 B from the start of 'x_ptr'" in problem for problem in traced.problems)


@pytest.mark.parametrize("past", [0, 1])
def test_a_pointer_chosen_from_two_belongs_to_the_chosen(past: int) -> None:
    both, z = torch.zeros(2048), torch.zeros(1000)
    with trace() as traced:
        kernels.reads_one_of_two[(8,)](both[1000:2000], both[:1000], z, 1000, BLOCK=128, PAST=past)
    assert ["+4000 B from the start of 'y_ptr'" in problem for problem in traced.problems] == [True] * past


def test_the_hooks_are_taken_out() -> None:
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = dict(vars(InterpreterBuilder)), dict(vars(GridExecutor))
    with pytest.raises(ZeroDivisionError), trace():
        raise ZeroDivisionError
    assert (dict(vars(InterpreterBuilder)), dict(vars(GridExecutor))) == before


# ---------------------------------------------------------------------------------------------- traffic


def test_traffic_of_a_matrix_vector_product() -> None:
    x, w = torch.randn(512).to(BF16), torch.randn(64, 512).to(BF16)
    with trace() as traced:
        y = kernels.run_matrix_vector(x, w)
    torch.testing.assert_close(y.float(), w.float() @ x.float(), rtol=2e-2, atol=2e-1)
    (launch,) = traced.launches
    assert launch.grid == (16, 1, 1)
    assert (launch["w_ptr"].read_bytes, launch["w_ptr"].programs_per_sector, launch["w_ptr"].streamed_bytes) == (65536, 1, 65536)
    assert (launch["x_ptr"].programs_per_sector, launch["x_ptr"].cache_bytes, launch["x_ptr"].streamed_bytes) == (16, 16 * 1024, 0)
    assert launch["y_ptr"].written_bytes >= 128


def sampled(run: Callable[[], object], unit: int | None = 1) -> Launch:
    def select(launch: Launch) -> Selection | None:
        return None if unit is None else sampling.select(launch.grid, unit)

    with trace(race=False, select=select) as traced:
        run()
    return traced.launches[0]


def products() -> None:
    kernels.run_matrix_vector(torch.zeros(512, dtype=BF16), torch.zeros(1022, 512, dtype=BF16))


def tickets_of_four() -> None:
    x, y, scratch = torch.zeros(254, 64), torch.zeros(64), torch.empty(254, 64)
    kernels.last_of_each_group_sums[(254,)](x, scratch, torch.zeros(64, dtype=torch.int32), y, 254, BLOCK=64, GROUP=4)


@pytest.mark.parametrize(("run", "unit"), [(products, 1), (tickets_of_four, 4)])
def test_a_sample_counts_up_to_the_whole(run: Callable[[], None], unit: int) -> None:
    exact, estimate = sampling.count(sampled(run, None)), sampling.count(sampled(run, unit))
    assert estimate.traced < exact.traced // 8
    assert dataclasses.replace(estimate, traced=exact.traced) == exact


def test_programs_that_share_a_ticket_are_found() -> None:
    launch = sampled(tickets_of_four)
    with pytest.raises(sampling.NotUniformError, match="atomics"):
        sampling.count(launch)
    assert sampling.next_unit(launch) == 4
    for unit in (2, 8):
        with pytest.raises(sampling.NotUniformError, match="ticket"):
            sampling.count(sampled(tickets_of_four, unit))


def test_samples_that_say_nothing_are_refused() -> None:
    launch = sampled(lambda: kernels.shifts_in_place[(64,)](torch.zeros(4096), 4096, BLOCK=64))
    with pytest.raises(sampling.NotUniformError, match="x_ptr"):
        sampling.count(launch)
    assert sampling.next_unit(launch) is None


# ---------------------------------------------------------------------------------------------- compiled code

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


# ---------------------------------------------------------------------------------------------- a whole step


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
    assert text.count("\n| ") == 1 + len(report.launches)
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


def test_layers_that_differ_are_refused() -> None:
    assert repetitions("abcd", "abcbcd", 40) == [1, 40, 40, 1]
    assert repetitions("abc", "abcabc", 40) == [40, 40, 40]
    with pytest.raises(GraniteError, match="layers differ"):
        repetitions("abc", "abcd", 2)
