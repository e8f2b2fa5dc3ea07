"""The tracer: planted strays, races, missing barriers and disagreeing lanes are found, traffic is counted, samples count up."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import pytest
import torch
from granite_kernels.bench.offline import sampling
from granite_kernels.bench.offline.requested import Launch, Selection
from granite_kernels.bench.offline.traffic import TraceError, trace
from torch import Tensor

from granite_kernels.kernels import softmax
from granite_kernels.kernels.attention_decode import attention_decode
from tests import attention_cases
from tests import offline_kernels as kernels

BF16 = torch.bfloat16


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
    by_name = [{argument.name: argument for argument in traffic.arguments} for traffic in (exact, estimate)]
    tickets = [arguments.pop("ticket_ptr", None) for arguments in by_name]  # small: how many programs read a sector is a bound
    assert by_name[0] == by_name[1]
    if tickets[0] is not None and tickets[1] is not None:
        assert dataclasses.replace(tickets[1], programs_per_sector=tickets[0].programs_per_sector) == tickets[0]


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


def test_what_the_last_program_alone_runs_is_told_apart() -> None:
    """Four programs share a sequence of attention; the one that comes last joins their sums."""
    case = attention_cases.inputs(BF16, 64, 4, 1, [250], context=256)
    with trace(race=False, lines=True) as traced:
        case.run(attention_decode)
    assert sys.gettrace() is None
    (launch,) = traced.launches
    assert launch.programs == 4
    assert launch.lines is not None
    first = softmax.join.fn.__code__.co_firstlineno
    shares = {(file, line): share for file, line, share in launch.lines.shares()}
    assert {share for (file, line), share in shares.items() if file == "softmax.py" and line > first} == {0.25}
    assert {share for (file, _), share in shares.items() if file == "attention_decode.py"} == {0.0, 0.25}  # none is alone
