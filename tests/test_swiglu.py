"""swiglu against float64."""

from __future__ import annotations

import pytest
import torch

from granite_kernels.errors import GraniteError
from granite_kernels.kernels import swiglu as kernels
from granite_kernels.kernels.swiglu import swiglu
from granite_kernels.reference.swiglu import swiglu as reference
from granite_kernels.testing import assert_accurate
from tests.traced import Guarded, cost, run, same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [(512, 5, BF16), (8192, 2, BF16), (12800, 1, BF16), (1, 3, BF16), (96, 17, BF16), (1000, 3, BF16), (1025, 2, BF16)]
CASES += [(inner, rows, dtype) for inner, rows in [(96, 4), (1000, 2)] for dtype in (FP16, FP32)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("inner", "rows", "dtype"), CASES)
def test_swiglu(inner: int, rows: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(rows, 2 * inner) * 4).to(dtype)
    guarded = Guarded(gate_up)
    (out,), _ = run(lambda: [swiglu(guarded.tensor)])
    assert_accurate(out, reference(gate_up.double()), reference(gate_up))
    guarded.check()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_extreme_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 88.0, -88.0, 500.0, -500.0, 60000.0, -60000.0, float("inf")])
    gate_up = torch.cat((gate, torch.ones(9))).to(dtype)
    torch.testing.assert_close(swiglu(gate_up), gate_up[:9].clamp(min=0), rtol=0, atol=1e-30)


def test_a_row_does_not_depend_on_the_others() -> None:
    gate_up = torch.randn(17, 192).to(BF16)
    whole = swiglu(gate_up)
    for rows in (1, 7, 16):
        assert same_bits(whole[:rows], swiglu(gate_up[:rows]))


def test_any_shape_and_stride() -> None:
    gate_up = torch.randn(2, 3, 400).to(BF16)
    flat = swiglu(gate_up[..., ::2].contiguous())
    assert same_bits(swiglu(gate_up[..., ::2]), flat)
    assert same_bits(swiglu(gate_up[..., ::2].reshape(6, 200)).view(2, 3, 100), flat)
    assert swiglu(gate_up[:0]).shape == (0, 3, 200)
    assert swiglu(gate_up[0, 0]).shape == (200,)


def test_the_cost_is_the_traffic() -> None:
    gate_up = torch.randn(3, 2048).to(BF16)
    _, (launch,) = run(lambda: [swiglu(gate_up)], ("forward",))
    assert launch["gate_up_ptr"].programs_per_sector == 1
    assert cost(kernels, launch, {"gate_up_ptr": gate_up, "rows": 3, "inner": 1024})["bytes"] == launch.read_bytes + launch.written_bytes


def test_torch_sees_through_it() -> None:
    torch.library.opcheck(torch.ops.granite_kernels.swiglu.default, (torch.randn(3, 192),))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GraniteError, match=r"\(3, 7\): an even number of columns"):
        swiglu(torch.empty(3, 7))
    with pytest.raises(GraniteError, match=r"torch.float64: expected float32"):
        swiglu(torch.empty(3, 8, dtype=torch.float64))
