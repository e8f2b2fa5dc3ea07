"""The repaired interpreter: its arithmetic against PyTorch's, and inline assembly run instruction by instruction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from granite_kernels.bench.offline import ptx

from tests import offline_kernels as kernels

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_elementwise_arithmetic_is_torchs(dtype: torch.dtype) -> None:
    x, y = torch.randn(256).to(dtype), torch.randn(256).to(dtype)
    outputs = [torch.empty_like(x) for _ in range(5)]
    kernels.arithmetic[(1,)](x, y, *outputs, SIZE=256)
    fused = (x.double() * y.double() + x.double()).float().to(dtype)
    for actual, expected in zip(outputs, (x + y, x - y, x * y, torch.maximum(x, y), fused), strict=True):
        assert torch.equal(actual, expected) or (dtype == torch.float16 and actual is outputs[4])


def test_constants_of_bfloat16() -> None:
    x, y = torch.randn(128).to(BF16), torch.empty(128, dtype=BF16)
    kernels.add_one[(1,)](x, y, 128, BLOCK=128)
    assert torch.equal(y, x + 1)


def test_reductions_of_bfloat16_round_once() -> None:
    x, y = torch.randn(512).to(BF16), torch.empty(2, dtype=BF16)
    kernels.reduce[(1,)](x, y, SIZE=512)
    assert torch.equal(y, torch.stack([x.float().sum().to(BF16), x.max()]))


def test_casts_to_bfloat16_round_to_nearest_even() -> None:
    x = torch.randn(1024)
    x.view(torch.int32)[:512] = x.view(torch.int32)[:512] & ~0xFFFF | 0x8000  # ties
    x[:6] = torch.tensor([float("inf"), float("-inf"), 1e-40, 3.4e38, 0.0, -0.0])
    y = torch.empty(1024, dtype=BF16)
    kernels.cast[(1,)](x, y, SIZE=1024)
    assert torch.equal(y.view(torch.int16), x.to(BF16).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_to_float8_round_and_saturate(dtype: torch.dtype) -> None:
    x = torch.randn(256) * 100
    x[:2] = torch.tensor([1e6, -1e6])
    y = torch.empty(256, dtype=dtype)
    kernels.cast[(1,)](x, y, SIZE=256)
    largest = torch.finfo(dtype).max
    assert torch.equal(y.float(), x.clamp(-largest, largest).to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dot(dtype: torch.dtype) -> None:
    a, b, y = torch.randn(16, 128).to(dtype), torch.randn(128, 32).to(dtype), torch.empty(16, 32)
    kernels.product[(1,)](a, b, y, M=16, N=32, K=128)
    torch.testing.assert_close(y, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-4)


def test_assembly_is_executed() -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32)
    low, high = torch.empty(64, dtype=BF16), torch.empty(64, dtype=BF16)
    kernels.decode_nibbles[(1,)](words, low, high, SIZE=64)
    assert torch.equal(low, (words & 15).to(BF16))
    assert torch.equal(high, (words >> 16 & 15).to(BF16))


def test_dot_of_bytes_and_a_prefetch() -> None:
    a, b, c = (torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32) >> shift for shift in (0, 0, 8))
    y = torch.empty(64, dtype=torch.int32)
    kernels.dot_of_bytes[(1,)](a, b, c, y, SIZE=64)
    expected = c + (a.view(torch.uint8).int() * b.view(torch.int8).int()).view(64, 4).sum(1)
    assert torch.equal(y, expected.int())


def bits(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


@pytest.mark.parametrize(
    ("text", "operands", "expected"),
    [
        ("lop3.b32 $0, $1, $2, $3, 0xEA;", (0b1100, 0b1010, 0b0001), 0b1001),  # (a & b) | c
        ("prmt.b32 $0, $1, $2, 0x9410;", (0x44332281, 0x887766F5), 0x00F52281),  # bytes 0, 1, 4 and the sign of byte 1
        ("shr.s32 $0, $1, 4;", (0x80000000,), 0xF8000000),
        ("shr.u32 $0, $1, 4;", (0x80000000,), 0x08000000),
        ("shl.b32 $0, $1, 32;", (1,), 0),
        ("mad.lo.s32 $0, $1, $2, $3;", (0xFFFFFFFF, 3, 1), 0xFFFFFFFE),
        ("cvt.rn.f32.s32 $0, $1;", (0xFFFFFFFF,), 0xBF800000),
        ("cvt.rni.s32.f32 $0, $1;", (0x40200000,), 2),  # 2.5
        ("cvt.rn.bf16x2.f32 $0, $1, $2;", (0x3F800000, 0x40000000), 0x3F804000),
        ("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; mov.b32 $0, {hi, lo}; }", (0x12345678,), 0x56781234),
        ("fma.rn.f16x2 $0, $1, $2, $3;", (0x3C004000, 0x40004200, 0x3C003C00), 0x42004700),
        ("ex2.approx.ftz.f32 $0, $1;", (0x40400000,), 0x41000000),
    ],
)
def test_ptx(text: str, operands: tuple[int, ...], expected: int) -> None:
    (result,) = ptx.evaluate(text, 1, [bits(operand) for operand in operands])
    assert int(result[0]) == expected, f"{int(result[0]):#x}"


def test_unknown_assembly_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="vote"):
        ptx.evaluate("vote.sync.all.pred $0, $1, $2;", 1, [bits(1), bits(1)])


@pytest.mark.parametrize(
    ("operation", "x", "y", "most"),
    [("add", 2**31 - 2, 1, 2**31 - 1), ("sub", -(2**31) + 1, 1, -(2**31)), ("mul", 2**15, -(2**16), -(2**31))],
)
def test_integers_that_overflow_are_found(operation: str, x: int, y: int, most: int) -> None:
    kernel, out = getattr(kernels, f"{operation}_integers"), torch.empty(1, dtype=torch.int32)
    kernel[(1,)](torch.tensor([x], dtype=torch.int32), torch.tensor([y], dtype=torch.int32), out)
    assert out.item() == most
    with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
        kernel[(1,)](torch.tensor([x], dtype=torch.int32), torch.tensor([2 * y], dtype=torch.int32), out)
    wide = torch.empty(1, dtype=torch.int64)
    kernel[(1,)](torch.tensor([x]), torch.tensor([2 * y]), wide)
    assert abs(wide.item()) > 2**31 - 1
