"""The matrix operations of a decode step on packed weights, interpreted and traced: the dense ones' rules, for every format."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from granite_kernels import launch
from granite_kernels.formats import NAMES, get
from granite_kernels.launch import INTERPRETED, Target, matrix_launch
from granite_kernels.linear import composed, launches
from granite_kernels.weight import Part, Weight
from tests.packed_cases import random_part
from tests.test_linear import BF16, FP16, FP32, ORDERS, Call, make, verify


@dataclasses.dataclass
class PackedCall(Call):
    """A call whose weight is `packed` by part; a part that is None is dense, of the values that `tensors` hold."""

    packed: tuple[Part | None, ...] = ()

    def weight(self, matrix: Tensor) -> Weight:
        parts = []
        for part, dense in zip(self.packed, matrix.split(self.parts), strict=True):
            if part is None:
                parts.append(Part("dense", (dense,), (dense.shape[0], dense.shape[1])))
            elif matrix.dtype == torch.float64:
                parts.append(Part("dense", (get(part.format).unpack(part.planes, part.shape).double(),), part.shape))
            else:
                parts.append(part)
        return Weight(*parts)


def pack(call: Call, formats: tuple[str, ...], parts: tuple[int, ...] = ()) -> PackedCall:
    """The same call with a weight of parts in `formats`, of `parts` rows each."""
    matrix = call.tensors["weight"]
    rows = parts or (matrix.shape[0],)
    shapes = zip(formats, rows, strict=True)
    packed = tuple(None if name == "dense" else random_part(name, (count, matrix.shape[1]), count) for name, count in shapes)
    return PackedCall(call.name, call.tensors, rows, call.scalars, packed)


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two multiprocessors are filled by few programs, of which each costs the interpreter some tenths of a second."""
    torch.manual_seed(0)
    monkeypatch.setattr(launch, "INTERPRETED", Target(arch=90, sms=2))


@pytest.mark.parametrize(("dtype", "tokens"), [(BF16, 1), (BF16, 2), (BF16, 16), (FP16, 5), (FP32, 5)])
@pytest.mark.parametrize("format", NAMES)
def test_every_format(format: str, tokens: int, dtype: torch.dtype) -> None:
    verify(pack(make("norm_logits", 1, tokens, dtype, columns=512, rows=27), (format,)), ORDERS[:1])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("name", ["linear", "linear_add", "norm_gate_up_swiglu", "norm_qkv_rope_append"])
def test_every_operation(name: str, tokens: int, dtype: torch.dtype) -> None:
    """Two programs share k, in every order."""
    assert matrix_launch(32, 512, tokens, launch.INTERPRETED, "q4_k").splits == 2
    verify(pack(make(name, 1, tokens, dtype, columns=512, rows=32, heads=(1, 1, 16)), ("q4_k",)))


@pytest.mark.parametrize(
    ("format", "columns"), [("q4_0", 576), ("q8_0", 576), ("int8", 1536), ("fp8", 32), ("q4_k", 1536), ("q5_1", 12800)]
)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_columns_that_fill_no_step(format: str, columns: int, dtype: torch.dtype) -> None:
    verify(pack(make("norm_logits", 1, 3, dtype, columns=columns, rows=17), (format,)), ORDERS[:1])


REAL = [(name, 2048, 1) for name in NAMES] + [(name, 8192, tokens) for name, tokens in (("q4_k", 1), ("q6_k", 16), ("q8_0", 8))]


@pytest.mark.parametrize(("format", "columns", "tokens"), REAL)
def test_real_sizes(format: str, columns: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column, some rows, the launch that the whole matrix would get."""
    shape = matrix_launch(2048, columns, tokens, INTERPRETED, format)
    monkeypatch.setattr(launches, "matrix_launch", lambda *_: shape)
    verify(pack(make("linear_add", 1, tokens, columns=columns, rows=32), (format,)), ORDERS[:1])


MIXED = [("q4_k", "q4_k", "q6_k"), ("q4_k", "q6_k"), ("dense", "q8_0"), ("q5_0", "dense", "int8"), ("int4_g128", "q3_k")]


@pytest.mark.parametrize(("dtype", "tokens"), [(BF16, 1), (BF16, 16), (FP32, 5)])
@pytest.mark.parametrize("name", ["linear_add", "norm_qkv_rope_append", "norm_gate_up_swiglu"])
@pytest.mark.parametrize("formats", MIXED)
def test_formats_mixed_in_one_launch(formats: tuple[str, ...], name: str, tokens: int, dtype: torch.dtype) -> None:
    three = len(formats) == 3
    parts = {
        "linear_add": (33, 18, 1) if three else (34, 18),
        "norm_qkv_rope_append": (32, 32, 32) if three else (64, 32),
        "norm_gate_up_swiglu": (40, 40),
    }[name]
    call = make(name, 1, tokens, dtype, columns=256, rows=sum(parts), heads=(1, 1, 32))
    if three and name == "norm_gate_up_swiglu":
        formats = formats[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, name, None)  # one launch it must be
        verify(pack(call, formats, parts), ORDERS[:1])


@pytest.mark.parametrize("name", ["norm_gate_up_swiglu", "norm_qkv_rope_append"])
def test_halves_that_are_no_whole_eights_are_composed(name: str) -> None:
    verify(pack(make(name, 1, 2, columns=256, rows=40, heads=(1, 1, 8)), ("q4_k",)), ORDERS[:1])
