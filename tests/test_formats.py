"""Weight formats: values against gguf-py, planes against the documented bit positions, quantizers against round to
nearest.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.formats import GGUF_NAMES, INT4_NAMES, NAMES, get, get_coded, get_gguf

HALVES = {  # byte offsets of the float16 fields in a block
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}
LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
QUANTIZED = ("q8_0", "q5_0", "q4_k", "q6_k", "int8", "int4_g32", "int4_g64", "int4_g128", "fp8")


def random_blocks(name: str, rows: int, columns: int, kind: str = "random", seed: int = 0) -> Tensor:
    """Blocks [rows, row_bytes] with every bit pattern that a file may hold, and finite float16 fields."""
    format = get_gguf(name)
    count = columns // format.block
    rng = np.random.default_rng(seed)
    fill = {"zero": 0, "ones": 255}.get(kind)
    blocks = rng.integers(0, 256, (rows, count, format.block_bytes), dtype=np.uint8)
    if fill is not None:
        blocks[:] = fill
    for offset in HALVES[name]:
        field = blocks[..., offset : offset + 2]
        high = field[..., 1]
        high[(high & 0x7C) == 0x7C] &= 0xBF  # neither infinite nor NaN
        if kind == "denormal":
            field[:] = rng.integers(-1023, 1024, (rows, count, 1)).astype(np.int16).view(np.uint8)
            high[...] = (high & 0x83).astype(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


def oracle(name: str, blocks: Tensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()]))


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal shapes, and values equal with the sign of their zeros."""
    return actual.shape == expected.shape and torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def matrix(kind: str, rows: int = 32, columns: int = 1024) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "heavy":  # Student's t with four degrees of freedom
        normal /= torch.randn(4, rows, columns, generator=generator).square().mean(0).sqrt()
    return normal * 0.02


@pytest.mark.parametrize("kind", ["random", "zero", "ones", "denormal"])
@pytest.mark.parametrize("name", GGUF_NAMES)
def test_values_and_bytes_are_the_files(name: str, kind: str) -> None:
    format = get_gguf(name)
    for rows, columns in ((1, 512), (35, 1536), (16, 256)):
        blocks = random_blocks(name, rows, columns, kind)
        expected, shape = oracle(name, blocks), (rows, columns)
        planes = format.pack(blocks, shape)
        assert same_bits(format.dequantize(blocks, shape), expected)
        assert same_bits(format.unpack(planes, shape), expected)
        assert torch.equal(format.blocks(planes, shape), blocks)


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_rows_that_need_several_chunks(name: str) -> None:
    format, shape = get_gguf(name), (100, 12800)
    blocks = random_blocks(name, *shape)
    planes = format.pack(blocks, shape)
    assert same_bits(format.dequantize(blocks, shape), oracle(name, blocks))
    assert torch.equal(format.unpack(planes, shape), format.dequantize(blocks, shape))
    assert torch.equal(format.blocks(planes, shape), blocks)


@pytest.mark.parametrize("columns", [32, 96, 576])
@pytest.mark.parametrize("name", LEGACY)
def test_units_that_fill_no_super_block(name: str, columns: int) -> None:
    format, shape = get_gguf(name), (19, columns)
    blocks = random_blocks(name, *shape)
    planes = format.pack(blocks, shape)
    assert same_bits(format.unpack(planes, shape), oracle(name, blocks))
    assert torch.equal(format.blocks(planes, shape), blocks)


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_every_finite_scale(name: str) -> None:
    """Each of the 63,488 finite float16 values as each scale field."""
    format = get_gguf(name)
    bits = np.arange(65536, dtype=np.uint16)
    finite = bits[(bits & 0x7C00) != 0x7C00]
    columns = format.block
    blocks = random_blocks(name, len(finite), columns).numpy()
    for offset in HALVES[name]:
        blocks[:, offset : offset + 2] = finite.view(np.uint8).reshape(-1, 2)
    rows = slice(None, None, 1 if columns == 32 else 8)
    chosen = torch.from_numpy(blocks[rows].copy())
    assert same_bits(format.dequantize(chosen, (len(chosen), columns)), oracle(name, chosen))


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_other_dtypes_round_once(name: str) -> None:
    format, shape = get_gguf(name), (17, 512)
    blocks = random_blocks(name, *shape)
    exact = oracle(name, blocks)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(format.dequantize(blocks, shape, dtype), exact.to(dtype))
        assert torch.equal(format.unpack(format.pack(blocks, shape), shape, dtype), exact.to(dtype))


def test_dequantize_takes_stacked_and_strided_blocks() -> None:
    format = get_gguf("q6_k")
    blocks = random_blocks("q6_k", 12, 512)
    assert torch.equal(format.dequantize(blocks.view(3, 4, -1), (3, 4, 512)), oracle("q6_k", blocks).view(3, 4, 512))
    assert torch.equal(format.dequantize(blocks[::2], (6, 512)), oracle("q6_k", blocks)[::2])
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), blocks.flatten()))[1:].view(blocks.shape)  # at an odd address
    assert torch.equal(format.blocks(format.pack(shifted, (12, 512)), (12, 512)), blocks)


# ---- planes


@pytest.mark.parametrize("name", NAMES)
def test_planes_are_aligned_padded_and_hardly_larger(name: str) -> None:
    format, shape = get(name), (35, 1536)
    planes = make_planes(name, shape)
    assert [(tuple(p.shape), p.dtype) for p in planes] == list(format.layout(shape))
    for plane in planes:
        assert plane.is_contiguous() and plane.data_ptr() % 16 == 0
        by_row = plane.transpose(1, 2).flatten(0, 1) if plane.shape[0] == 6 else plane
        assert not by_row[35:].float().any()
    nbytes = sum(p.numel() * p.element_size() for p in planes)
    assert nbytes * 8 / (48 * 1536) == pytest.approx(format.bits_per_weight, rel=0.005)  # int8, fp8: a scale a row besides
    assert format.bits_per_weight <= 1.03 * stored_bits(name)


def make_planes(name: str, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    if name in GGUF_NAMES:
        return get_gguf(name).pack(random_blocks(name, *shape), shape)
    if name.endswith("_zero"):
        codes, scale, zero = coded(name, shape)
        return get_coded(name).pack(codes, scale.half(), zero)
    return get(name).quantize(matrix("normal", *shape))


def stored_bits(name: str) -> float:
    if name in GGUF_NAMES:
        return 8 * get_gguf(name).block_bytes / get_gguf(name).block
    if name in ("int8", "fp8"):
        return 8
    return 4 + (20 if name.endswith("_zero") else 16) / get(name).block


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_fields_stand_where_documented(bits: int) -> None:
    from granite_kernels.formats.words import gather, spread

    codes = torch.randint(0, 256, (3, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for shift in range(9 - bits):
        words = gather(codes.clone(), shift, bits)
        assert words.shape == (3, 3, bits) and words.dtype == torch.int32
        for row, column in ((0, 0), *((2, 32 + e) for e in range(32))):
            assert field(words[row, column // 32], column % 32, bits) == (int(codes[row, column]) >> shift) % 2**bits
        assert torch.equal(spread(words, bits), (codes >> shift) & (2**bits - 1))


def field(words: Tensor, element: int, bits: int) -> int:
    """The documented position of an element of a unit."""
    t, i = divmod(element, 8)
    i2, i1, i0 = i >> 2, (i >> 1) & 1, i & 1
    count = 4 // bits
    at = 16 * i0 + 8 * i2 + bits * (2 * (t % count) + i1)
    return (int(words.flatten()[t // count]) >> at) % 2**bits


def half(word: int) -> float:
    return torch.tensor(word % 65536, dtype=torch.int32).to(torch.int16).view(torch.float16).item()


def plane_value(name: str, planes: tuple[Tensor, ...], row: int, column: int) -> float:
    """One weight read from the planes as the docstrings say, with Python's integers."""
    format = get(name)
    unit, element = divmod(column, 32)
    code, shift = 0, 0
    for bits, plane in zip(format.code_bits, planes, strict=False):
        if bits == 8:
            code = int(plane[row, column])
        else:
            words = plane[row // 8, unit, row % 8] if bits == 1 else plane[row, unit]
            code += field(words, element, bits) << shift
        shift += bits
    meta = [p[row // 8, :, row % 8].tolist() for p in planes[len(format.code_bits) :]]
    top, second = column // 256, element // 16
    match name:
        case "q8_0":
            return meta[0][unit] * code
        case "q4_0" | "q5_0":
            return meta[0][unit] * (code - (8 if name == "q4_0" else 16))
        case "q4_1" | "q5_1":
            return half(meta[0][unit]) * code + half(meta[0][unit] >> 16)
        case "q2_k":
            pair = (meta[0][unit] >> 8 * second) & 255
            return half(meta[1][top]) * (pair & 15) * code - half(meta[1][top] >> 16) * (pair >> 4)
        case "q3_k":
            scale = (meta[0][unit] >> 4 * second) & 15 | ((meta[1][top] >> 2 * (column % 256 // 16)) & 3) << 4
            return meta[2][top] * (scale - 32) * (code - 4)
        case "q4_k" | "q5_k":
            scale, low = meta[0][unit] & 255, meta[0][unit] >> 8
            return half(meta[1][top]) * scale * code - half(meta[1][top] >> 16) * low
        case "q6_k":
            scale = ((meta[0][unit] >> 8 * second) + 128) % 256 - 128
            return meta[1][top] * scale * (code - 32)
        case _:
            raise AssertionError(name)


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_a_kernel_can_read_the_planes_as_documented(name: str) -> None:
    shape = (21, 512)
    blocks = random_blocks(name, *shape)
    planes, exact = get_gguf(name).pack(blocks, shape), oracle(name, blocks)
    for row in (0, 9, 20):
        found = torch.tensor([plane_value(name, planes, row, column) for column in range(512)], dtype=torch.float64)
        scale = exact[row].abs().max().item()
        torch.testing.assert_close(found, exact[row].double(), rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_single_rows(name: str) -> None:
    shape = (35, 512)
    planes = make_planes(name, shape)
    ids = torch.tensor([[34, 0, 7], [8, 34, 16]], dtype=torch.int32)
    every = get(name).unpack(planes, shape, torch.bfloat16)
    assert torch.equal(get(name).rows(planes, shape, ids, torch.bfloat16), every[ids])


# ---- codes beside their scales


def coded(name: str, shape: tuple[int, int]) -> list[Tensor]:
    """Random codes, scales and zero points as another library would store them."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = shape
    if name in ("int8", "fp8"):
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        codes = codes if name == "int8" else (codes / 3).to(torch.float8_e4m3fn)
        return [codes, torch.rand(rows, 1, generator=generator)]
    groups = columns // get(name).block
    scale = torch.randn(rows, groups, generator=generator).to(torch.bfloat16)
    zero = torch.randint(0, 17, (rows, groups), generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    return [codes, scale, zero] if name.endswith("_zero") else [codes, scale]


@pytest.mark.parametrize("name", ["int8", "fp8", *INT4_NAMES])
def test_codes_beside_scales(name: str) -> None:
    format, shape = get_coded(name), (21, 768)
    codes, scale, *zero = coded(name, shape)
    planes = format.pack(codes, scale, *zero)
    for found, given in zip(format.codes(planes, shape), (codes, scale, *zero), strict=True):
        assert found.dtype == given.dtype and torch.equal(found.float(), given.float())
    offset = 0 if name in ("int8", "fp8") else zero[0].repeat_interleave(format.block, 1) if zero else 8
    width = shape[1] // scale.shape[1]
    expected = (codes.float() - offset) * scale.float().repeat_interleave(width, 1)
    assert torch.equal(format.unpack(planes, shape), expected)


# ---- quantizers


@pytest.mark.parametrize("name", ["q8_0", "q5_0"])
def test_simple_quantizers_equal_gguf_py(name: str) -> None:
    weight = matrix("heavy", 24, 576)
    weight[3], weight[4, :32], weight[5] = 0.0, 1.0, weight[5].round(decimals=2)
    expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(get_gguf(name).blocks(get(name).quantize(weight), weight.shape), torch.from_numpy(expected))


def nearest(x: Tensor, name: str) -> Tensor:
    """Round to nearest with the same groups: what the searches must beat."""
    if name == "q4_k":
        x = x.unflatten(1, (-1, 32))
        low = x.amin(-1, keepdim=True).clamp(max=0)
        scale = (x.amax(-1, keepdim=True) - low) / 15
        return (((x - low) / scale).round() * scale + low).flatten(1)
    group, top = (16, 31) if name == "q6_k" else (get(name).block, 7.5)  # 7.5: as compressed-tensors does
    x = x.unflatten(1, (-1, group))
    scale = x.abs().amax(-1, keepdim=True) / top
    return ((x / scale).round().clamp(-int(top) - 1, int(top)) * scale).flatten(1)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize(("name", "share"), [("q4_k", 0.95), ("q6_k", 0.97), ("int4_g32", 0.9), ("int4_g64", 0.9), ("int4_g128", 0.9)])
def test_searched_scales_beat_round_to_nearest(name: str, share: float, kind: str) -> None:
    weight = matrix(kind)
    searched = relative_error(get(name).unpack(get(name).quantize(weight), weight.shape), weight)
    assert searched <= share * relative_error(nearest(weight, name), weight)


@pytest.mark.parametrize(("name", "limit"), [("int8", 0.025), ("fp8", 0.027)])
def test_eight_bits_are_close(name: str, limit: float) -> None:
    weight = matrix("heavy")
    assert relative_error(get(name).unpack(get(name).quantize(weight), weight.shape), weight) < limit


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantizers_on_odd_matrices(name: str) -> None:
    format = get(name)
    weight = torch.zeros(5, 256)
    weight[1], weight[2, ::32], weight[3] = 0.5, -3.0, torch.linspace(-1, 2, 256)
    values = format.unpack(format.quantize(weight.to(torch.bfloat16)), weight.shape)
    assert values.isfinite().all()
    assert not values[0].any() and not values[4].any()
    torch.testing.assert_close(values[:3], weight[:3], rtol=0.01, atol=0.01)
    torch.testing.assert_close(values[3], weight[3], rtol=0, atol=0.2)


# ---- errors


def test_errors_say_what_was_found() -> None:
    with pytest.raises(GraniteError, match="no weight format 'q9_k'"):
        get("q9_k")
    with pytest.raises(GraniteError, match="'int8' is not a GGUF block format"):
        get_gguf("int8")
    with pytest.raises(GraniteError, match="'q4_k' is stored in blocks"):
        get_coded("q4_k")
    with pytest.raises(GraniteError, match=r"q4_k: .* multiple of 256 .* found \(4, 576\)"):
        get_gguf("q4_k").pack(torch.zeros(4, 324, dtype=torch.uint8), (4, 576))
    with pytest.raises(GraniteError, match=r"q8_0: blocks uint8 \(4, 34\) .* found torch.uint8 \(4, 36\)"):
        get_gguf("q8_0").dequantize(torch.zeros(4, 36, dtype=torch.uint8), (4, 32))
    with pytest.raises(GraniteError, match=r"q3_k: .* can't be quantized"):
        get("q3_k").quantize(torch.zeros(16, 256))
    with pytest.raises(GraniteError, match="16-bit scales"):
        get_coded("int4_g32").pack(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1))
    with pytest.raises(GraniteError, match=r"metadata of shapes \[\(4, 2\)\]"):
        get_coded("int4_g32").pack(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1, dtype=torch.float16))


def test_names_are_those_of_the_objects() -> None:
    assert [get(name).name for name in NAMES] == list(NAMES)
