"""embed: rows, multiplier, rounding, equal to the reference to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from granite_kernels import formats
from granite_kernels.errors import GraniteError
from granite_kernels.kernels import embed as kernels
from granite_kernels.kernels.embed import embed
from granite_kernels.reference.embed import embed as reference
from granite_kernels.weight import Part, Weight
from tests.traced import Guarded, cost, run, same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def some_ids(vocab: int) -> Tensor:
    return torch.tensor([[0, vocab - 1, 3], [vocab // 2, 3, 0]])


@pytest.mark.parametrize("multiplier", [12.0, 1.0])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("vocab", "hidden"), [(49155, 64), (7, 2048), (301, 1536), (9, 1000), (5, 1)])
def test_embed(vocab: int, hidden: int, dtype: torch.dtype, multiplier: float) -> None:
    guarded, ids = Guarded(torch.randn(vocab, hidden).to(dtype)), some_ids(vocab)
    weight = Weight.dense(guarded.tensor)
    (out,), _ = run(lambda: [embed(ids, weight, multiplier=multiplier, dtype=dtype)])
    assert same_bits(out, reference(ids, weight, multiplier=multiplier, dtype=dtype))
    guarded.check()


@pytest.mark.parametrize(("stored", "dtype"), [(FP32, BF16), (FP32, FP16), (BF16, FP32), (BF16, FP16), (FP16, BF16)])
def test_another_dtype_is_rounded_before_the_multiplier(stored: torch.dtype, dtype: torch.dtype) -> None:
    weight, ids = Weight.dense(torch.randn(50, 96).to(stored)), some_ids(50)
    assert same_bits(embed(ids, weight, multiplier=3.3, dtype=dtype), reference(ids, weight, multiplier=3.3, dtype=dtype))


def test_rows_of_a_packed_weight_are_decoded_alone() -> None:
    format = formats.get("q8_0")
    planes, ids = format.quantize(torch.randn(48, 64)), some_ids(48)
    expected = format.unpack(planes, (48, 64))[ids] * 12.0
    assert torch.equal(embed(ids, Weight(Part("q8_0", planes, (48, 64))), multiplier=12.0, dtype=FP32), expected)


def test_any_shape_of_ids() -> None:
    weight = Weight.dense(torch.randn(9, 64))
    whole = embed(torch.arange(9)[None], weight, multiplier=2.0, dtype=FP32)
    assert embed(torch.empty(1, 0, dtype=torch.int64), weight, multiplier=2.0, dtype=FP32).shape == (1, 0, 64)
    assert same_bits(embed(torch.arange(8).view(4, 2).T, weight, multiplier=2.0, dtype=FP32), whole[0, :8].view(4, 2, 64).transpose(0, 1))


def test_the_cost_is_the_traffic() -> None:
    weight, ids = torch.randn(40, 2048, dtype=BF16), torch.tensor([[0, 39, 7]])
    _, (launch,) = run(lambda: [embed(ids, Weight.dense(weight), multiplier=12.0, dtype=BF16)], ("forward",))
    args = {"weight_ptr": weight, "out_ptr": weight, "hidden": 2048}
    assert cost(kernels, launch, args)["bytes"] == launch["weight_ptr"].read_bytes + launch["out_ptr"].written_bytes


def test_torch_sees_through_it() -> None:
    torch.library.opcheck(torch.ops.granite_kernels.embed.default, (torch.tensor([[1, 2]]), torch.randn(5, 32), 2.0, BF16))


def test_what_does_not_fit_is_refused() -> None:
    weight = Weight.dense(torch.randn(9, 64))
    with pytest.raises(GraniteError, match=r"ids are torch.float32: expected int64"):
        embed(torch.zeros(1, 2), weight, multiplier=1.0, dtype=FP32)
    with pytest.raises(GraniteError, match=r"torch.float32 to torch.float64: expected"):
        embed(torch.zeros(1, 2, dtype=torch.int64), weight, multiplier=1.0, dtype=torch.float64)
