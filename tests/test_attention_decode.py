"""Attention of a decode step, in the interpreter with the blocks and splits that an H100 would get, and its compiled code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from granite_kernels.bench.offline import compiled
from granite_kernels.bench.offline.traffic import trace
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.kernels import attention_decode as module
from granite_kernels.kernels.attention_decode import attention_decode, workspace_size
from granite_kernels.launch import AttentionDecodeLaunch, Target, attention_decode_launch
from granite_kernels.workspace import Workspace
from tests import attention_cases as cases

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
H100 = Target(90, 132)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def narrow(patch: pytest.MonkeyPatch, splits: int, **shape: int) -> None:
    """As on a GPU of few multiprocessors: `splits` programs a sequence, so that a short cache already gives each several tiles."""

    def fewer(*arguments: object) -> AttentionDecodeLaunch:
        return dataclasses.replace(attention_decode_launch(*arguments), splits=splits, **shape)

    patch.setattr(module, "attention_decode_launch", fewer)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "tokens", "lengths", "starts"),
    [
        (BF16, 64, 4, 1, [700, 0, 63, 64], [0, 0, 0, 0]),
        (BF16, 128, 4, 1, [511], [130]),
        (BF16, 64, 3, 1, [300, 17], [5, 16]),
        (F16, 64, 2, 4, [130, 61], [0, 3]),
        (F16, 128, 1, 2, [250, 0, 1], [0, 1, 0]),
        (F16, 128, 4, 7, [90], [0]),
        (F32, 64, 4, 1, [200, 31], [0, 2]),
        (F32, 128, 2, 3, [70], [1]),
        (F32, 128, 3, 16, [150], [0]),
        (BF16, 16, 8, 3, [200], [0]),
        (BF16, 32, 32, 3, [150], [7]),
    ],
)
def test_is_right(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    tokens: int,
    lengths: list[int],
    starts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow(monkeypatch, 5)
    cases.assert_right(attention_decode, cases.inputs(dtype, head_dim, group, tokens, lengths, starts))


@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_number_of_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 3)
    cases.assert_right(attention_decode, cases.inputs(BF16, 64, 4, tokens, [189 if tokens <= 8 else 445], [2]))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_sixteen_rows_of_their_own_lengths(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 2)
    lengths = [0, 1, 15, 16, 17, 31, 32, 62, 63, 64, 65, 127, 128, 200, 384, 400]
    cases.assert_right(attention_decode, cases.inputs(dtype, 64, 2, 1, lengths, [length // 3 for length in lengths], context=512))


def test_the_split_of_an_h100() -> None:
    cases.assert_right(attention_decode, cases.inputs(BF16, 64, 4, 1, [700, 63], [5, 0]))


def test_several_kv_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 2)
    cases.assert_right(attention_decode, cases.inputs(BF16, 64, 2, 2, [200, 3], kv_heads=3))


def test_spans_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 3)
    cases.assert_right(attention_decode, cases.inputs(BF16, 64, 4, 1, [700, 450]))


def test_queries_that_are_padding_yield_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 3)
    out = cases.assert_right(attention_decode, cases.inputs(BF16, 64, 4, 5, [0, 10], [3, 20]))
    assert not out[0, :3].any()
    assert not out[1].any()


def test_scores_that_overflow_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 3)
    cases.assert_right(attention_decode, cases.inputs(F16, 64, 4, 2, [150], size=100.0, scale=1e-4))


def test_rows_that_see_nothing_of_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tokens see nothing of the last span, whose sums must then weigh nothing."""
    narrow(monkeypatch, 2, shift=0)
    cases.assert_right(attention_decode, cases.inputs(BF16, 64, 1, 16, [56]))


def test_bits_depend_neither_on_the_batch_nor_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 4)
    case = cases.inputs(BF16, 64, 4, 1, [300, 37, 130], [11, 37, 0])
    together = case.run(attention_decode)
    for index in range(3):
        assert torch.equal(together[index], case.row(index).run(attention_decode)[0])
    assert torch.equal(together, case.without_padding().run(attention_decode))


@pytest.mark.parametrize(("tokens", "lengths"), [(2, [250, 70]), (9, [300])])
def test_order_of_programs_is_free(tokens: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 4)
    cases.assert_order_is_free(attention_decode, cases.inputs(BF16, 64, 4, tokens, lengths))


def test_a_workspace_serves_call_after_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tickets are zero after each call, and nothing of the last call's sums is read: lengths grow as in a replayed graph."""
    narrow(monkeypatch, 4)
    case = cases.inputs(BF16, 64, 4, 1, [190], context=256)
    workspace = Workspace.allocate(*workspace_size(1, 1, 4, 64, 1, H100), "cpu")

    def decode(*arguments: Tensor, scale: float) -> Tensor:
        return attention_decode(*arguments, scale=scale, workspace=workspace)

    for _ in range(4):
        cases.assert_right(decode, case)
        assert not workspace.tickets.any()
        workspace.partials.fill_(float("nan"))
        case.lengths.add_(1)
        for cache in (case.k_cache, case.v_cache):
            cache[:, :, int(case.lengths)] = torch.randn(64)


def test_each_slot_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 3)
    case = cases.inputs(BF16, 64, 4, 1, [499], context=512)
    with trace(race=True) as traced:
        case.run(attention_decode)
    read = traced.launches[0]["k_cache_ptr"]
    assert read.read_bytes == 500 * 64 * 2
    assert read.programs_per_sector == 1


def test_programs_that_the_cache_has_no_room_for_are_not_launched() -> None:
    """Nor do the bits depend on that room."""
    bits = []
    for context in (256, 768):
        with trace() as traced:
            bits.append(cases.inputs(BF16, 64, 4, 1, [250], context=context).run(attention_decode))
        assert traced.launches[0].programs == context // 64
    assert torch.equal(*bits)


def test_more_than_eight_tokens_have_programs_of_four_tiles() -> None:
    """Whose sums are then 1.6 % of what they read, and no longer the step's largest extra writes."""
    lengths = [511, 0, 300, 255, 256, 63, 1, 2, 3]
    case = cases.inputs(BF16, 64, 4, 1, lengths, context=512)
    with trace() as traced:
        case.run(attention_decode)
    assert traced.launches[0].programs == len(lengths) * 512 // (4 * 64)
    cases.assert_right(attention_decode, case)


def test_rows_of_q_too_far_apart() -> None:
    case = cases.inputs(BF16, 64, 2, 3, [5, 6])
    q = torch.empty((1 << 31) + case.q.numel(), dtype=BF16).as_strided(case.q.shape, (1 << 31, *case.q.stride()[1:]))
    with pytest.raises(GraniteError, match=r"2\^31"):
        cases.Inputs(**{**vars(case), "q": q}).run(attention_decode)


def test_too_small_a_workspace() -> None:
    case = cases.inputs(F32, 64, 2, 3, [5])
    with pytest.raises(ValueError, match="workspace"):
        attention_decode(
            case.q, case.k_cache, case.v_cache, case.lengths, case.starts, scale=1.0, workspace=Workspace.allocate(1, 1, "cpu")
        )


def test_too_many_tokens() -> None:
    with pytest.raises(GraniteError, match="16"):
        cases.inputs(F32, 64, 2, 17, [5]).run(attention_decode)


def test_caches_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 2)
    torch.use_deterministic_algorithms(False)  # which would fill, so touch, the whole memory
    near = cases.inputs(BF16, 64, 2, 3, [5, 9], context=32)
    assert torch.equal(cases.far_rows(64, 3).run(attention_decode), near.run(attention_decode))


def test_131072_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest context, tiles enlarged to keep the interpreter quick: spans, masks and offsets at their largest."""
    narrow(monkeypatch, 33, block_n=1024)
    case = cases.longest(1)
    torch.testing.assert_close(case.run(attention_decode), cases.exact(case), rtol=0, atol=1e-5)


def test_as_a_torch_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 2)
    torch.use_deterministic_algorithms(False)
    case = cases.inputs(F32, 64, 2, 1, [70])
    workspace = Workspace.allocate(*workspace_size(1, 1, 2, 64, 1, H100), "cpu")
    workspace.partials.zero_()
    arguments = (case.q, case.k_cache, case.v_cache, case.lengths, case.starts, workspace.tickets, workspace.partials, cases.SCALE)
    torch.library.opcheck(torch.ops.granite_kernels.attention_decode.default, arguments)
    traced = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(case.run(traced), case.run(attention_decode))


@pytest.mark.parametrize("target", [Target(80, 108), H100, Target(100, 148), Target(89, 128), Target(120, 170)], ids=str)
def test_one_sequence_fills_the_gpu(target: Target) -> None:
    for kv_heads in (1, 4, 8):
        for head_dim, programs in ((64, 3 * target.sms), (128, 2 * target.sms)):
            splits = attention_decode_launch(1, 4, kv_heads, head_dim, BF16, target).splits
            assert programs - kv_heads < kv_heads * splits <= programs


@pytest.mark.parametrize("archs", [pytest.param((90,), id="90"), pytest.param((80, 120), id="others", marks=pytest.mark.slow)])
def test_compiled_code(archs: tuple[int, ...]) -> None:
    launches = compiled(f"{cases.__file__}:launch_decode", archs)
    assert [launch.arch for launch in launches] == [arch for arch in archs for _ in range(8)]
    assert [launch.new for launch in launches] == [True, False] * 4 * len(archs)  # other sizes compile nothing
    for launch in launches:
        assert launch.spills == 0, launch
        assert set(launch.loop_widths) == {128}
        assert launch.async_copies > 0
        assert any(name.startswith("HMMA") for name in launch.tensor_core)
        assert launch.shared <= 99 << 10
        assert launch.pdl == (launch.arch >= 90) == (launch.grid_dependency == 2)
    for launch in launches[::4] + launches[1::4]:  # of one token
        tile = 2 * 64 * int(launch.constexprs["HEAD_DIM"]) * 2  # bytes of k and v
        assert launch.num_warps * launch.loop_instructions <= 0.031 * tile  # warp instructions a byte
        assert launch.num_warps * launch.instructions <= 0.16 * tile  # all there is, run for one tile, that of the last program included
        programs = min(launch.blocks_per_sm, 3 if tile == 16 << 10 else 2)
        assert programs * tile * (launch.num_stages - 1) >= 24 << 10  # bytes in flight of a multiprocessor
