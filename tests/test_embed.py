"""embed: rows, multiplier, rounding."""

from __future__ import annotations

import pytest
import torch

from granite_kernels import formats
from granite_kernels.kernels.embed import embed
from granite_kernels.reference import embed as reference
from granite_kernels.weight import Part, Weight
from tests.traced import run as in_all_orders

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)



@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "hidden"), [(49155, 64), (301, 1536), (7, 1000)])
def test_embed_equals_the_reference_to_the_bit(vocab: int, hidden: int, dtype: torch.dtype) -> None:
    weight = Weight.dense(randn(vocab, hidden, dtype=dtype))
    ids = torch.tensor([[0, vocab - 1, 3], [vocab // 2, 3, 0]])
    (out,), _ = in_all_orders(lambda: [embed(ids, weight, multiplier=12.0, dtype=dtype)])
    assert torch.equal(out, reference.embed(ids, weight, multiplier=12.0, dtype=dtype))


def test_another_dtype_is_rounded_before_the_multiplier() -> None:
    weight, ids = Weight.dense(randn(50, 96, dtype=torch.float32)), torch.tensor([[4, 49]])
    out = embed(ids, weight, multiplier=3.0, dtype=torch.bfloat16)
    assert torch.equal(out, reference.embed(ids, weight, multiplier=3.0, dtype=torch.bfloat16))


def test_rows_of_a_packed_weight_are_decoded_alone() -> None:
    values, ids = randn(48, 64, dtype=torch.float32), torch.tensor([[0, 47], [5, 5]])
    format = formats.get("q8_0")
    planes = format.quantize(values)
    weight = Weight(Part("q8_0", planes, (48, 64)))
    expected = format.unpack(planes, (48, 64))[ids] * 12.0
    assert torch.equal(embed(ids, weight, multiplier=12.0, dtype=torch.float32), expected)


def test_torch_sees_through_the_operation() -> None:
    arguments = (torch.tensor([[1, 2]]), randn(5, 32, dtype=torch.float32), 2.0, torch.float32)
    torch.library.opcheck(torch.ops.granite_kernels.embed.default, arguments)
