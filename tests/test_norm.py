"""rms_norm and add_rms_norm against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.kernels import norm as kernels
from granite_kernels.reference import norm as reference
from granite_kernels.testing import assert_accurate
from tests.traced import Guarded, cost, run, same_bits

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GRANITE = [(1024, 3), (1536, 2), (2048, 5), (4096, 1)]
RAGGED = [(1, 3), (96, 17), (96, 33), (576, 4), (1000, 3), (128, 129), (8192, 1)]
CASES = [(hidden, rows, BF16) for hidden, rows in GRANITE + RAGGED] + [
    (hidden, rows, dtype) for hidden, rows in [(96, 5), (1000, 2)] for dtype in (FP16, FP32)
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, hidden) * torch.logspace(-2, 1, rows)[:, None]
    return x.to(dtype), torch.randn(rows, hidden).to(dtype), (1 + torch.randn(hidden) / 4).to(dtype)


@pytest.mark.parametrize(("hidden", "rows", "dtype"), CASES)
def test_rms_norm(hidden: int, rows: int, dtype: torch.dtype) -> None:
    x, _, weight = inputs(rows, hidden, dtype)
    guarded = Guarded(x), Guarded(weight)
    (out,), _ = run(lambda: [kernels.rms_norm(guarded[0].tensor, guarded[1].tensor, eps=EPS)])
    exact = reference.rms_norm(x.double(), weight.double(), eps=EPS)
    assert_accurate(out, exact, reference.rms_norm(x, weight, eps=EPS))
    for tensor in guarded:
        tensor.check()


@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize(("hidden", "rows", "dtype"), CASES)
def test_add_rms_norm(hidden: int, rows: int, dtype: torch.dtype, scale: float) -> None:
    x, residual, weight = inputs(rows, hidden, dtype)
    guarded = Guarded(x), Guarded(residual), Guarded(weight)
    (out, added), _ = run(lambda: kernels.add_rms_norm(*(g.tensor for g in guarded), eps=EPS, scale=scale))
    exact, exact_added = reference.add_rms_norm(x.double(), residual.double(), weight.double(), eps=EPS, scale=scale)
    eager, eager_added = reference.add_rms_norm(x, residual, weight, eps=EPS, scale=scale)
    assert_accurate(added, exact_added, eager_added)
    assert_accurate(out, exact, eager)
    assert same_bits(out, kernels.rms_norm(added, weight, eps=EPS))  # of the stream as it was stored
    for tensor in guarded:
        tensor.check()


def test_a_row_does_not_depend_on_the_others() -> None:
    x, residual, weight = inputs(17, 96, BF16)
    whole, (normed, added) = kernels.rms_norm(x, weight, eps=EPS), kernels.add_rms_norm(x, residual, weight, eps=EPS)
    for rows in (1, 7, 16):
        assert same_bits(whole[:rows], kernels.rms_norm(x[:rows], weight, eps=EPS))
        fewer = kernels.add_rms_norm(x[:rows], residual[:rows], weight, eps=EPS)
        assert same_bits(normed[:rows], fewer[0])
        assert same_bits(added[:rows], fewer[1])
    x[3] = float("nan")
    spoilt = kernels.rms_norm(x, weight, eps=EPS)
    assert spoilt[3].isnan().all()
    assert same_bits(spoilt[4:], whole[4:])


def test_values_are_rounded_as_the_model_rounds() -> None:
    x, _, _ = inputs(4, 1000, BF16)
    weight = torch.full((1000,), 1 + 2**-7, dtype=BF16)
    steps = (x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()).to(BF16)
    once = (x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()).to(BF16)
    out = kernels.rms_norm(x, weight, eps=EPS)
    assert (out != once).any()
    assert (out == steps * weight).float().mean() > 0.999  # the mean's own last bit may decide a tie


def test_any_shape_and_stride() -> None:
    x, residual, weight = inputs(6, 192, BF16)
    flat = kernels.rms_norm(x[:, ::2].contiguous(), weight[:96], eps=EPS)
    assert same_bits(kernels.rms_norm(x[:, ::2], weight[:96], eps=EPS), flat)
    assert same_bits(kernels.rms_norm(x.view(2, 3, 192)[..., ::2], weight[:96], eps=EPS).view(6, 96), flat)
    spread = torch.stack((weight, residual[0]), dim=1)[:, 0]
    assert same_bits(kernels.rms_norm(x, spread, eps=EPS), kernels.rms_norm(x, weight, eps=EPS))
    assert kernels.rms_norm(x[:0], weight, eps=EPS).shape == (0, 192)
    assert kernels.rms_norm(x[0], weight, eps=EPS).shape == (192,)


def test_the_cost_is_the_traffic() -> None:
    x, residual, weight = inputs(3, 1024, BF16)
    _, (launch,) = run(lambda: [kernels.rms_norm(x, weight, eps=EPS)], ("forward",))
    args = {"x_ptr": x, "rows": 3, "hidden": 1024}
    assert launch["x_ptr"].programs_per_sector == 1
    assert cost(kernels, launch, args)["bytes"] == launch.read_bytes + launch.written_bytes
    _, (launch,) = run(lambda: kernels.add_rms_norm(x, residual, weight, eps=EPS), ("forward",))
    assert cost(kernels, launch, {**args, "residual_ptr": residual})["bytes"] == launch.read_bytes + launch.written_bytes


def test_torch_sees_through_them() -> None:
    x, residual, weight = inputs(3, 96, BF16)
    torch.library.opcheck(torch.ops.granite_kernels.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.granite_kernels.add_rms_norm.default, (x, residual, weight, EPS, 0.22))


def test_what_does_not_fit_is_refused() -> None:
    x, residual, weight = inputs(3, 96, BF16)
    with pytest.raises(GraniteError, match=r"\(3, 96\) don't go with a weight of shape \(95,\)"):
        kernels.rms_norm(x, weight[:95], eps=EPS)
    with pytest.raises(GraniteError, match="don't go with"):
        kernels.add_rms_norm(x, residual[:2], weight, eps=EPS)
    with pytest.raises(GraniteError, match=r"torch.float64, torch.float64: expected one of float32"):
        kernels.rms_norm(x.double(), weight.double(), eps=EPS)
    with pytest.raises(GraniteError, match="at most 16384"):
        kernels.rms_norm(torch.empty(1, 20000), torch.empty(20000), eps=EPS)
