"""Experts whose weights are packed: the dense ones' rules, for every format."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from granite_kernels.bench.offline.traffic import trace

from granite_kernels.formats import NAMES, get
from granite_kernels.kernels import moe as kernels
from granite_kernels.reference import moe as reference
from granite_kernels.testing import assert_accurate
from granite_kernels.weight import DENSE, Part, Weight
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
    """Five experts of 32 rows and 256 columns."""
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


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("format", [DENSE, "q4_k", "q6_k"])
@pytest.mark.parametrize(("name", "columns"), [(OPERATIONS[0], 1536), (OPERATIONS[1], 512)])
def test_each_chosen_expert_of_3b_is_read_once_and_no_other(name: str, columns: int, format: str, tokens: int) -> None:
    """All columns and experts, 32 rows of each expert; an expert that is everybody's and one that is nobody's."""
    few = {"hidden": columns, "inner": 16} if "gate" in name else {"hidden": 32, "inner": columns}
    call = make(name, tokens, experts=40, top_k=8, choosing="one for all", **few)
    if format != DENSE:
        part = random_part(format, (call.weight.shape[0], columns), 3)
        call = PackedCall(call.name, call.tensors, call.experts, part)
    with trace(race=False) as traced:
        result = call.on(kernels)
    (launch,) = traced.launches
    assert not traced.problems
    chosen = set(call.tensors["chosen"].flatten().tolist())
    assert result.isfinite().all()
    assert len(chosen) == 8 if tokens == 1 else 39 >= len(chosen) > 8
    planes = [argument for argument in launch.arguments if argument.name.startswith("planes.")]
    assert len(planes) == (1 if format == DENSE else len(call.part.planes))
    for plane in planes:
        readers = torch.from_numpy(plane.readers[: plane.bytes // 32].copy()).view(40, -1)
        assert [bool((readers[e] == 1).all()) for e in range(40)] == [e in chosen for e in range(40)]
        assert not readers[[e for e in range(40) if e not in chosen]].any()
