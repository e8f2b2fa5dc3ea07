"""Layers built by several threads: the same bits, the same error, and PyTorch's threads as they were."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from granite_kernels.model.checkpoint.finite import SCALE_OFFSETS
from granite_kernels.model.checkpoint.gguf_file import read_gguf
from granite_kernels.model.workers import run

from granite_kernels import GraniteForCausalLM
from granite_kernels.errors import GraniteError
from tests import tiny, tiny_gguf


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_jobs_meet_on_threads_of_their_own_and_keep_their_order(threads: Callable[[int], None]) -> None:
    threads(3)
    meet = threading.Barrier(3)

    def job(number: int) -> tuple[int, int, str]:
        meet.wait(timeout=30)
        return number, torch.get_num_threads(), threading.current_thread().name

    done = run([functools.partial(job, number) for number in range(6)])
    assert [number for number, _, _ in done] == list(range(6))
    assert {count for _, count, _ in done} == {1}
    assert torch.get_num_threads() == 3


def test_the_first_in_order_is_the_one_that_fails(threads: Callable[[int], None]) -> None:
    threads(2)
    late = threading.Event()
    ran: list[None] = []

    def first() -> None:
        late.wait(timeout=30)
        raise GraniteError("first")

    def second() -> None:
        late.set()
        raise GraniteError("second")

    def another() -> None:
        ran.append(None)
        time.sleep(0.01)

    with pytest.raises(GraniteError, match="first"):
        run([first, second, *[another] * 500])
    assert len(ran) < 500
    assert torch.get_num_threads() == 2


def test_one_thread_stays_where_it_is(threads: Callable[[int], None]) -> None:
    threads(1)
    assert set(run([threading.current_thread] * 3)) == {threading.current_thread()}


@pytest.mark.parametrize("quantization", [None, "q4_k_m", "int4"])
def test_weights_don_t_depend_on_the_threads(quantization: str | None, tmp_path: Path, threads: Callable[[int], None]) -> None:
    theirs = tiny.make(heads=4, kv_heads=2, intermediate_size=256, num_hidden_layers=3)
    if quantization is None:
        tiny_gguf.write(theirs, tmp_path / "model.gguf", "Q4_K", tiny_gguf.Q4_K_M)
        source = tmp_path / "model.gguf"
    else:
        source = tiny.save(theirs.to(torch.bfloat16), tmp_path / "model")
    found = []
    for count in (1, 2):
        threads(count)
        model = GraniteForCausalLM.from_pretrained(source, device="cpu", backend="torch", quantization=quantization)
        found.append(list(model.weights.state_dict().items()))
        assert torch.get_num_threads() == count
    for (name, one), (other_name, other) in zip(*found, strict=True):
        assert name == other_name and one.dtype == other.dtype and torch.equal(one, other)


def test_of_two_damaged_tensors_the_first_is_named(tmp_path: Path, threads: Callable[[int], None]) -> None:
    path = tmp_path / "model.gguf"
    tiny_gguf.write(tiny.make(heads=4, kv_heads=2, intermediate_size=256, num_hidden_layers=6), path, "Q4_K")
    with path.open("r+b") as file:
        for name in ("blk.2.ffn_down.weight", "blk.1.attn_q.weight"):
            file.seek(read_gguf(path).tensors[name].offset + SCALE_OFFSETS["q4_k"][0])
            file.write(b"\xff\xff")
    for count in (1, 2):
        threads(count)
        with pytest.raises(GraniteError, match=r"model.gguf: blk.1.attn_q.weight \(q4_k\) has 1 NaN"):
            GraniteForCausalLM.from_pretrained(path, device="cpu", backend="torch")
