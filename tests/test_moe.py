"""norm_route: the norm, the chosen experts in order, and their shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.kernels import moe as kernels
from granite_kernels.kernels.moe import norm_route
from granite_kernels.kernels.norm import rms_norm
from granite_kernels.reference import moe as reference
from granite_kernels.testing import assert_accurate
from tests.traced import Guarded, cost, run, same_bits

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [(1024, 32, 8), (1536, 40, 8), (96, 10, 4), (1000, 8, 2), (64, 1, 1), (64, 3, 3)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(tokens: int, hidden: int, experts: int, dtype: torch.dtype, router: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    matrix = 2 * hidden**-0.5 * torch.randn(experts, hidden)  # logits of a few units
    return torch.randn(1, tokens, hidden).to(dtype), (1 + torch.randn(hidden) / 4).to(dtype), matrix.to(router)


@pytest.mark.parametrize(("dtype", "router_dtype"), [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP16)])
@pytest.mark.parametrize(("hidden", "experts", "top_k"), SIZES)
def test_norm_route(hidden: int, experts: int, top_k: int, dtype: torch.dtype, router_dtype: torch.dtype) -> None:
    x, norm, router = inputs(3, hidden, experts, dtype, router_dtype)
    guarded = Guarded(x), Guarded(norm), Guarded(router)
    (h, chosen, shares), _ = run(lambda: norm_route(*(g.tensor for g in guarded), top_k=top_k, eps=EPS))
    expected_h, expected, expected_shares = reference.norm_route(x, norm, router, top_k=top_k, eps=EPS)
    exact = reference.norm_route(x.double(), norm.double(), router.double(), top_k=top_k, eps=EPS)
    assert_accurate(h, exact[0], expected_h)
    # from its own h, so that the last bit of the norm, which may differ from PyTorch's, decides no tie
    logits = torch.nn.functional.linear(h.to(router_dtype), router).double()
    picked = logits.gather(-1, chosen.long())
    unit = torch.finfo(router_dtype).eps * logits.abs().max()
    assert (picked.diff(dim=-1) <= unit).all()
    assert (picked - logits.sort(dim=-1, descending=True).values[..., :top_k]).abs().max() <= unit
    assert all(len(set(places)) == top_k for places in chosen[0].tolist())
    assert chosen.dtype == torch.int32
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, 3))
    if dtype == FP32:
        assert torch.equal(chosen, expected)
        assert_accurate(shares, exact[2], expected_shares)
    for tensor in guarded:
        tensor.check()


def test_ties_go_to_the_lower_index() -> None:
    x, norm, _ = inputs(2, 64, 8, FP32, FP32)
    rows = torch.randn(3, 64)
    router = rows[[2, 0, 1, 0, 2, 1, 2, 0]]
    _, chosen, shares = norm_route(x, norm, router, top_k=6, eps=EPS)
    _, expected, expected_shares = reference.norm_route(x, norm, router, top_k=6, eps=EPS)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(shares, expected_shares)
    zeros = torch.zeros(8, 64)
    zeros[::2] = -0.0
    _, chosen, shares = norm_route(x, norm, zeros, top_k=3, eps=EPS)
    assert chosen.tolist() == [[[0, 1, 2]] * 2]
    torch.testing.assert_close(shares, torch.full((1, 2, 3), 1 / 3))


def test_the_norm_is_the_norms() -> None:
    x, norm, router = inputs(3, 1024, 8, BF16, FP32)
    torch.testing.assert_close(norm_route(x, norm, router, top_k=2, eps=EPS)[0], rms_norm(x, norm, eps=EPS), rtol=2**-7, atol=0)


def test_a_token_does_not_depend_on_the_others() -> None:
    x, norm, router = inputs(17, 96, 10, BF16, FP32)
    whole = norm_route(x, norm, router, top_k=4, eps=EPS)
    fewer = norm_route(x[:, :5].contiguous(), norm, router, top_k=4, eps=EPS)
    assert all(same_bits(a[:, :5], b) for a, b in zip(whole, fewer, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")
def test_spoilt_tokens_choose_within_the_experts() -> None:
    x, norm, router = inputs(3, 96, 10, FP32, FP32)
    good = norm_route(x, norm, router, top_k=4, eps=EPS)
    x[0, 1], x[0, 2, 5] = float("nan"), float("inf")
    (_, chosen, shares), _ = run(lambda: norm_route(x, norm, router, top_k=4, eps=EPS), ("forward",))
    assert ((chosen >= 0) & (chosen < 10)).all()
    assert all(len(set(places)) == 4 for places in chosen[0].tolist())
    assert same_bits(chosen[0, 0], good[1][0, 0])
    assert same_bits(shares[0, 0], good[2][0, 0])


def test_the_cost_is_the_traffic() -> None:
    x, norm, router = inputs(2, 1024, 32, BF16, FP32)
    _, (launch,) = run(lambda: norm_route(x, norm, router, top_k=8, eps=EPS), ("forward",))
    args = {"x_ptr": x, "router_ptr": router, "hidden": 1024, "experts": 32, "TOP_K": 8}
    assert cost(kernels, launch, args)["bytes"] == launch.read_bytes + launch.written_bytes


def test_torch_sees_through_it() -> None:
    x, norm, router = inputs(2, 32, 4, FP32, FP32)
    torch.library.opcheck(torch.ops.granite_kernels.norm_route.default, (x, norm, router, 2, EPS))


def test_what_does_not_fit_is_refused() -> None:
    x, norm, router = inputs(2, 32, 4, FP32, FP32)
    with pytest.raises(GraniteError, match=r"router \(4, 32\) and top 5 don't go together"):
        norm_route(x, norm, router, top_k=5, eps=EPS)
    with pytest.raises(GraniteError, match="don't go together"):
        norm_route(x, norm[:31], router, top_k=2, eps=EPS)
    with pytest.raises(GraniteError, match=r"torch.float64, torch.float64, torch.float32: expected"):
        norm_route(x.double(), norm.double(), router, top_k=2, eps=EPS)
