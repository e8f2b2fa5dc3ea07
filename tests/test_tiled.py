"""The product of many tokens with packed weights: in every format, in parts, shared between programs, at the regimes' borders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from granite_kernels import formats
from granite_kernels.kernels import linear as kernels
from granite_kernels.kernels.linear import linear
from granite_kernels.launch import INTERPRETED, tiled_launch
from granite_kernels.linear import regimes, tiled
from granite_kernels.reference import linear as reference
from granite_kernels.testing import assert_accurate
from granite_kernels.weight import Weight
from granite_kernels.workspace import Workspace
from tests.packed_cases import random_part, random_weight
from tests.traced import ORDERS, run, same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def verify(tokens: int, weight: Weight, dtype: torch.dtype = BF16, orders: tuple[str, ...] = ("forward",)) -> Tensor:
    """The accuracy rule for `linear` and `linear_add` over the same packed weights; returns linear's result."""
    x, residual = torch.randn(1, tokens, weight.shape[1]).to(dtype), torch.randn(1, tokens, weight.shape[0]).to(dtype)
    calls: list[Callable[..., Tensor]] = [
        lambda m, t: m.linear(t(x), weight),
        lambda m, t: m.linear_add(t(x), weight, t(residual), scale=0.22),
    ]
    actual, _ = run(lambda: [call(kernels, lambda v: v) for call in calls], orders)
    for one, call in zip(actual, calls, strict=True):
        assert_accurate(one, call(reference, Tensor.double), call(reference, lambda v: v))
    return actual[0]


@pytest.mark.parametrize("tokens", [17, 64, 130])
@pytest.mark.parametrize("format", formats.NAMES)
def test_every_format(format: str, tokens: int) -> None:
    verify(tokens, random_weight((format, 80), columns=256))


@pytest.mark.parametrize(("format", "columns"), [("q8_0", 32), ("q5_0", 576), ("int8", 608)])
def test_columns_that_fill_no_step(format: str, columns: int) -> None:
    verify(20, random_weight((format, 48), columns=columns))


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_every_dtype(dtype: torch.dtype) -> None:
    """float32 has no tensor cores: decoded once, the product is the library's."""
    verify(20, random_weight(("q4_k", 48), columns=256), dtype)


def test_parts_of_several_formats_make_one_result() -> None:
    parts = (("q4_k", 64), ("q6_k", 17), ("int4_g32_zero", 9))
    weight = random_weight(*parts, columns=256)
    x = torch.randn(1, 20, 256).to(BF16)
    whole, split = linear(x, weight), [linear(x, Weight(part)) for part in weight.parts]
    assert same_bits(whole, torch.cat(split, -1))
    verify(20, weight, orders=ORDERS)


def test_programs_share_the_columns() -> None:
    """In any order of programs, and leaving the tickets as they were."""
    weight = random_weight(("q4_k", 48), columns=1024)
    assert tiled_launch(48, 1024, 70, INTERPRETED).splits == 4
    verify(70, weight, orders=ORDERS)
    x = torch.randn(70, 1024).to(BF16)
    workspace = Workspace.allocate(*tiled.workspace_size((48, 1024), 70, x), "cpu")
    workspace.partials.fill_(float("nan"))
    first = linear(x, weight, workspace=workspace)
    assert not workspace.tickets.any()
    assert same_bits(first, linear(x, weight, workspace=workspace))
    with pytest.raises(ValueError, match="the workspace holds"):
        linear(x, weight, workspace=Workspace.allocate(1, 1, "cpu"))


def test_decoded_once_for_very_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(("q4_k", 48), ("q6_k", 16), columns=256)
    monkeypatch.setattr(regimes, "DECODE_ONCE", 20)
    _, launches = run(lambda: [linear(torch.randn(20, 256).to(BF16), weight)], ("forward",))
    assert [launch.name for launch in launches] == ["_rows_kernel"] * 2
    verify(20, weight)


REAL = {"few": (33, "q4_k", 2048), "many": (1000, "q6_k", 2048)}


@pytest.mark.parametrize("case", REAL)
def test_real_sizes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column and some rows, with the shape that the whole matrix gets; of many tokens a tile and a bit."""
    tokens, format, columns = REAL[case]
    shape = tiled_launch(16384, columns, tokens, INTERPRETED)
    monkeypatch.setattr(tiled, "tiled_launch", lambda *_: shape)
    verify(min(tokens, shape.block_m + 3), random_weight((format, shape.block_n + 16), columns=columns))


def test_shapes() -> None:
    """Enough programs for the card, each with whole steps of the columns; scratch within a bound."""
    for rows, columns in ((2048, 2048), (3072, 2048), (2048, 8192), (16384, 2048), (4096, 12800), (576, 1536), (48, 96)):
        for tokens in (17, 64, 65, 130, 500, 1000):
            shape = tiled_launch(rows, columns, tokens, INTERPRETED)
            assert columns % (32 * shape.units * shape.splits) == 0
            programs = shape.tiles(rows, tokens) * shape.splits
            assert (
                4 * programs >= 3 * INTERPRETED.sms
                or columns // (2 * shape.splits) < 256
                or columns // (32 * shape.units) % (2 * shape.splits)
            )
            assert shape.workspace(rows, tokens)[1] <= 2 * INTERPRETED.sms * 128 * 128


def test_torch_sees_through_it() -> None:
    part = random_part("q4_k", (48, 256))
    x, out = torch.randn(20, 256).to(BF16), torch.empty(20, 48, dtype=BF16)
    for residual in (None, torch.randn(20, 48).to(BF16)):
        arguments = (x, list(part.planes), "q4_k", residual, out, torch.zeros(4, dtype=torch.int32), torch.zeros(1 << 14), 0.5)
        torch.library.opcheck(torch.ops.granite_kernels.tiled.default, arguments)
