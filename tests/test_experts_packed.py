"""Experts whose weights are packed: the dense ones' rules, for every format."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from granite_kernels.formats import NAMES, get
from granite_kernels.kernels import moe as kernels
from granite_kernels.reference import moe as reference
from granite_kernels.testing import assert_accurate
from granite_kernels.weight import Part, Weight
from tests.experts_cases import NAMES as OPERATIONS
from tests.experts_cases import Call, make
from tests.packed_cases import random_part
from tests.traced import run

BF16, FP32 = torch.bfloat16, torch.float32


@dataclasses.dataclass
class PackedCall(Call):
    """A call whose weight is `part`, or its exact values in float64."""

    part: Part | None = None

    def matrix(self, dtype: torch.dtype) -> Weight:
        assert self.part is not None
        exact = get(self.part.format).unpack(self.part.planes, self.part.shape)
        return Weight.dense(exact.double()) if dtype == torch.float64 else Weight(self.part)


def pack(name: str, tokens: int, format: str, dtype: torch.dtype) -> PackedCall:
    call = make(name, tokens, dtype, experts=5, hidden=256 if "gate" in name else 32, inner=16 if "gate" in name else 256)
    shape = (call.weight.shape[0], call.weight.shape[1])
    return PackedCall(call.name, call.tensors, call.experts, random_part(format, shape, 3))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def verify(call: PackedCall) -> None:
    (actual,), launches = run(lambda: [call.on(kernels)], ("forward",))
    assert_accurate(actual, call.on(reference, torch.float64), call.on(reference))
    tokens = actual.shape[1]
    assert [launch.name for launch in launches if "experts" in launch.name] == ([f"_{call.name}_kernel"] if tokens <= 16 else [])


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("tokens", [16, *(pytest.param(tokens, marks=pytest.mark.slow) for tokens in (1, 20))])
def test_every_format(format: str, tokens: int) -> None:
    for name in OPERATIONS:
        verify(pack(name, tokens, format, BF16))


@pytest.mark.parametrize("format", ["q4_k", "q8_0", "int4_g128"])
@pytest.mark.parametrize("tokens", [3, 17])
def test_float32(format: str, tokens: int) -> None:
    for name in OPERATIONS:
        verify(pack(name, tokens, format, FP32))
