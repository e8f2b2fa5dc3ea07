"""Packed rows as dense ones: equal to the format's `unpack` to the bit, in every format, gathered and whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from granite_kernels.bench.offline import compiled

from granite_kernels import formats
from granite_kernels.kernels.embed import embed
from granite_kernels.linear import rows
from granite_kernels.reference.embed import embed as reference
from granite_kernels.weight import Part, Weight, dense_matrix, dense_rows
from tests import packed_cases
from tests.packed_cases import random_part
from tests.traced import Guarded, cost, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def guarded(part: Part) -> tuple[Part, list[Guarded]]:
    planes = [Guarded(plane.view(torch.uint8)) for plane in part.planes]
    return Part(part.format, tuple(g.tensor.view(p.dtype) for g, p in zip(planes, part.planes, strict=True)), part.shape), planes


@pytest.mark.parametrize("format", formats.NAMES)
def test_every_format_whole(format: str) -> None:
    shape = (11, 768)
    part, planes = guarded(random_part(format, shape))
    (out,), _ = run(lambda: [rows.unpack(part, FP32)])
    assert torch.equal(out, formats.get(format).unpack(part.planes, shape))
    for plane in planes:
        plane.check()


@pytest.mark.parametrize("format", formats.NAMES)
def test_every_format_gathered(format: str) -> None:
    weight, ids = Weight(random_part(format, (37, 1280))), torch.tensor([[36, 3]])
    (out,), _ = run(lambda: [embed(ids, weight, multiplier=12.0, dtype=BF16)], ("forward",))
    assert torch.equal(out, reference(ids, weight, multiplier=12.0, dtype=BF16))


@pytest.mark.parametrize("format", ["q4_0", "q5_1", "q8_0", "int8", "int4_g32_zero", "fp8"])
@pytest.mark.parametrize("columns", [32, 96, 576])
def test_rows_shorter_than_a_block_of_256(format: str, columns: int) -> None:
    part = random_part(format, (9, columns))
    for dtype in (BF16, FP16):
        assert torch.equal(rows.unpack(part, dtype), formats.get(format).unpack(part.planes, (9, columns), dtype))


def test_scales_may_be_bfloat16() -> None:
    part = random_part("int4_g64", (16, 128))
    part = Part("int4_g64", (part.planes[0], part.planes[1].to(BF16)), part.shape)
    assert torch.equal(rows.unpack(part, FP32), formats.get("int4_g64").unpack(part.planes, part.shape))


@pytest.mark.parametrize("format", ["q4_k", "q8_0"])
def test_bytes_are_read_and_written_once(format: str) -> None:
    part = random_part(format, (32, 1024))
    _, (launch,) = run(lambda: [rows.unpack(part, BF16)], ("forward",))
    assert all(launch[f"planes.{i}"].read_bytes == plane.nbytes for i, plane in enumerate(part.planes))
    args = {"rows": 32, "COLUMNS": 1024, "planes": part.planes, "out_ptr": torch.empty(1, dtype=BF16)}
    assert cost(rows, launch, args)["bytes"] == launch.read_bytes + launch.written_bytes


def test_no_rows() -> None:
    weight = Weight(random_part("q6_k", (16, 256)))
    assert embed(torch.empty(1, 0, dtype=torch.int64), weight, multiplier=2.0, dtype=BF16).shape == (1, 0, 256)


def test_torch_sees_through_it() -> None:
    part = random_part("q6_k", (16, 256))
    for ids, count in ((torch.tensor([1, 2]), 2), (None, 16)):
        arguments = (ids, list(part.planes), "q6_k", count, 256, 2.0, BF16)
        torch.library.opcheck(torch.ops.granite_kernels.decode_rows.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_compiled(arch: int) -> None:
    """Codes by loads of 128 bits, and nothing spilled."""
    launches = compiled(f"{Path(packed_cases.__file__)}:decode", (arch,), args=(["q4_k", "q6_k"],))
    assert len(launches) == 4
    assert not any(launch.spills for launch in launches)
    assert all(launch.load_widths.get(128, 0) >= 1 for launch in launches)


@pytest.mark.parametrize("format", ["q6_k", "q3_k", "int8"])
def test_some_rows_are_decoded_alone(format: str) -> None:
    part = random_part(format, (48, 256))
    whole = dense_matrix(part, FP32)
    for first, count in ((0, 48), (16, 16), (5, 20), (40, 8)):
        assert torch.equal(dense_rows(part, first, count, FP32), whole[first : first + count])
