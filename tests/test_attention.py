"""Flash attention over the cache, in the interpreter with the blocks that a GPU would get, and its compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from granite_kernels.bench.offline import compiled

from granite_kernels.errors import GraniteError
from granite_kernels.kernels import attention as module
from granite_kernels.kernels.attention import attention
from granite_kernels.launch import AttentionLaunch
from tests import attention_cases as cases

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "tokens", "lengths", "starts"),
    [
        (BF16, 64, 4, 129, [0, 70], [0, 0]),
        (BF16, 128, 4, 33, [650, 0], [3, 0]),
        (BF16, 64, 3, 17, [0, 127], [0, 100]),
        (F16, 64, 2, 129, [1], [0]),
        (F16, 128, 1, 33, [300, 31], [299, 0]),
        (F16, 64, 5, 2, [63, 0], [0, 0]),
        (F32, 64, 4, 33, [40, 0], [0, 0]),
        (F32, 128, 2, 17, [100], [9]),
        (F32, 64, 1, 5, [0, 1, 31, 32], [0, 1, 0, 30]),
        (BF16, 16, 8, 7, [90], [0]),
        (F32, 32, 3, 9, [60], [1]),
        (BF16, 128, 2, 1, [200, 63], [0, 0]),
    ],
)
def test_is_right(dtype: torch.dtype, head_dim: int, group: int, tokens: int, lengths: list[int], starts: list[int]) -> None:
    cases.assert_right(attention, cases.inputs(dtype, head_dim, group, tokens, lengths, starts))


@pytest.mark.parametrize("tokens", range(1, 18))
def test_every_small_number_of_tokens(tokens: int) -> None:
    cases.assert_right(attention, cases.inputs(BF16, 64, 4, tokens, [61], [2]))


def test_several_kv_heads() -> None:
    cases.assert_right(attention, cases.inputs(BF16, 64, 2, 9, [20, 3], kv_heads=3))


def test_queries_that_are_padding_yield_zeros() -> None:
    out = cases.assert_right(attention, cases.inputs(BF16, 64, 4, 40, [0, 0, 0], [7, 0, 40]))
    assert not out[0, :7].any()
    assert not out[2].any()


def test_scores_that_overflow_float16() -> None:
    case = cases.inputs(F16, 64, 4, 17, [80], size=100.0, scale=1e-4)
    assert (case.q[0, 0, 0].double() @ case.k_cache[0, 0, :80].double().T).abs().max() > 2 * torch.finfo(F16).max
    cases.assert_right(attention, case)


def test_q_may_be_a_view() -> None:
    case = cases.inputs(BF16, 64, 4, 9, [30])
    wide = torch.full((1, 9, 12, 64), float("nan"), dtype=BF16)
    wide[:, :, 2:6] = case.q
    seen = cases.Inputs(wide[:, :, 2:6], case.k_cache, case.v_cache, case.lengths, case.starts)
    assert torch.equal(cases.assert_right(attention, seen), case.run(attention))


def test_bits_depend_neither_on_the_batch_nor_on_padding() -> None:
    case = cases.inputs(BF16, 64, 3, 50, [100, 37, 300], [11, 37, 0])
    together = case.run(attention)
    for index in range(3):
        assert torch.equal(together[index], case.row(index).run(attention)[0])
    assert torch.equal(together, case.without_padding().run(attention))


def test_a_prompt_in_pieces_has_the_bits_of_the_whole() -> None:
    case = cases.inputs(BF16, 64, 3, 150, [20], [4])
    pieces = []
    for first, last in ((0, 70), (70, 71), (71, 150)):
        piece = cases.Inputs(case.q[:, first:last], case.k_cache, case.v_cache, case.lengths + first, case.starts)
        pieces.append(piece.run(attention))
    assert torch.equal(torch.cat(pieces, 1), case.run(attention))


def test_order_of_programs_is_free() -> None:
    cases.assert_order_is_free(attention, cases.inputs(BF16, 64, 4, 70, [10, 5], kv_heads=2))


def test_caches_beyond_32_bits() -> None:
    torch.use_deterministic_algorithms(False)  # which would fill, so touch, the whole memory
    case = cases.far_rows(64, 3)
    near = cases.inputs(BF16, 64, 2, 3, [5, 9], context=32)
    assert torch.equal(case.run(attention), near.run(attention))


def test_as_a_torch_operation() -> None:
    torch.use_deterministic_algorithms(False)
    case = cases.inputs(F32, 64, 2, 3, [5])
    arguments = (case.q, case.k_cache, case.v_cache, case.lengths, case.starts, cases.SCALE)
    torch.library.opcheck(torch.ops.granite_kernels.attention.default, arguments)
    traced = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(case.run(traced), case.run(attention))


def test_nothing_to_do() -> None:
    case = cases.inputs(F32, 64, 2, 0, [5])
    assert case.run(attention).shape == (1, 0, 2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 2, 32)}, "does not go with"),
        ({"q": torch.zeros(1, 3, 2, 64, dtype=F16)}, "expected one of"),
        ({"q": torch.zeros(1, 3, 2, 65)[..., :64]}, "multiples of 16"),
        ({"v_cache": torch.zeros(1, 1, 64, 768).transpose(2, 3)}, "same strides"),
        ({"lengths": torch.zeros(1, dtype=torch.int64)}, "int32"),
        ({"starts": torch.zeros(2, dtype=torch.int32)}, "int32"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    case = cases.inputs(F32, 64, 2, 3, [5])
    with pytest.raises(GraniteError, match=message):
        cases.Inputs(**{**vars(case), **change}).run(attention)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_that_are_not_positive(scale: float) -> None:
    with pytest.raises(GraniteError, match="positive"):
        cases.inputs(F32, 64, 2, 3, [5], scale=scale).run(attention)


def test_head_size_that_is_no_power_of_two() -> None:
    with pytest.raises(GraniteError, match="head size 96"):
        cases.inputs(F32, 96, 2, 3, [5]).run(attention)


def test_131072_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest context, tiles enlarged to keep the interpreter quick: spans, masks and offsets at their largest."""
    monkeypatch.setattr(module, "attention_launch", lambda *_: AttentionLaunch(16, 2048, 8, 3))
    case = cases.longest(3)
    torch.testing.assert_close(case.run(attention), cases.exact(case), rtol=0, atol=1e-5)


INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTC", 120: "HMMA"}


@pytest.mark.parametrize("archs", [pytest.param((90,), id="90"), pytest.param((80, 100, 120), id="others", marks=pytest.mark.slow)])
def test_compiled_code(archs: tuple[int, ...]) -> None:
    launches = compiled(f"{cases.__file__}:launch_prefill", archs)
    assert [launch.arch for launch in launches] == [arch for arch in archs for _ in range(4)]
    assert [launch.new for launch in launches] == [True, False] * 2 * len(archs)  # other sizes compile nothing
    for launch in launches[::2]:
        assert launch.spills == 0, launch
        assert set(launch.load_widths) == {32, 128}
        assert launch.load_widths[32] == 2  # a row's length and start
        assert launch.async_copies > 0
        assert any(name.startswith(INSTRUCTION[launch.arch]) for name in launch.tensor_core), launch.tensor_core
        assert launch.shared <= (99 << 10 if launch.arch in (86, 89, 120) else 163 << 10)
        assert launch.pdl == (launch.arch >= 90) == (launch.grid_dependency == 2)


@pytest.mark.slow
def test_compiled_code_of_float32() -> None:
    launches = compiled(f"{cases.__file__}:launch_float32", (80, 90, 120)) + compiled(f"{cases.__file__}:launch_small_float32", (90,))
    assert len(launches) == 12
    assert [launch.spills for launch in launches] == [0] * len(launches)
    assert not any(launch.tensor_core for launch in launches)  # whose float32 is TF32
