"""Values of a row of a weight in any format, element by element: for the few rows that a gather asks for.

Planes, their order and the position of a code in its word: formats/base.py, formats/words.py; the formulas: formats/<format>.py.
A word is loaded by each of the 8 to 32 elements whose codes it holds, from L1: a gather waits for memory, it doesn't compute. The
results equal the format's `unpack` to the bit where the compiler fuses no product with a sum (enable_fp_fusion=False).
"""

from __future__ import annotations

import triton
import triton.language as tl

from granite_kernels import formats
from granite_kernels.formats.base import ROW
from granite_kernels.weight import DENSE

UNIT = tl.constexpr(32)
ZEROS = tl.constexpr(-1)


def layout(format: str) -> dict[str, int]:
    """Constants of a format: bits of a code in the first plane and in the second (0: there is none), columns a value of the first
    metadata plane (0: all), and what is taken off a code (ZEROS: a plane says)."""
    if format == DENSE:
        return {"LOW": 0, "HIGH": 0, "GROUP": 0, "CENTER": 0}
    found = formats.get(format)
    low, high = (*found.code_bits, 0)[:2]
    centers = {"q3_k": 4, "q4_0": 8, "q5_0": 16, "q6_k": 32}
    center = (ZEROS.value if format.endswith("_zero") else 8) if format.startswith("int4") else centers.get(format, 0)
    return {"LOW": low, "HIGH": high, "GROUP": found.metadata[0].width if found.metadata[0].width != ROW else 0, "CENTER": center}


@triton.jit
def _field(plane_ptr, row, column, columns, mask, BITS: tl.constexpr):
    """A code's bits in the plane of words."""
    unit, eighth, i = column // UNIT, column % UNIT // 8, column % 8
    if BITS == 1:
        at = (row // 8 * (columns // UNIT) + unit) * 8 + row % 8
    else:
        at = (row * (columns // UNIT) + unit) * BITS + eighth // (4 // BITS)
    shift = 16 * (i & 1) + 8 * (i >> 2) + BITS * (2 * (eighth % (4 // BITS)) + ((i >> 1) & 1))
    return (tl.load(plane_ptr + at, mask=mask, other=0) >> shift) & ((1 << BITS) - 1)


@triton.jit
def _shared(plane_ptr, row, group, groups, mask):
    """The value that a group of columns shares."""
    return tl.load(plane_ptr + (row // 8 * groups + group) * 8 + row % 8, mask=mask, other=0)


@triton.jit
def _halves(word):
    """Two float16 in 32 bits, the low one first."""
    return _half(word), _half(word >> 16)


@triton.jit
def _half(word):
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _e4m3(byte):
    """float8_e4m3fn, which no architecture below 8.9 converts: a float16 but for the exponent's bias, and for NaN."""
    bits = byte.to(tl.int16)
    half = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0)


@triton.jit
def row_values(
    planes,
    row,
    column,
    columns,
    mask,
    FORMAT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    CENTER: tl.constexpr,
):
    """Values float32 (dense: as stored) of `column`s of `row` (int64), of a matrix `columns` wide; constants from `layout`."""
    if LOW == 0:
        return tl.load(planes[0] + row * columns + column, mask=mask, other=0.0)

    if LOW == 8:
        code = tl.load(planes[0] + row * columns + column, mask=mask, other=0)
    else:
        code = _field(planes[0], row, column, columns, mask, LOW)
    if HIGH > 0:
        code |= _field(planes[1], row, column, columns, mask, HIGH) << LOW
    value = _e4m3(code) if FORMAT == "fp8" else code.to(tl.float32)

    M: tl.constexpr = 1 if HIGH == 0 else 2  # the first metadata plane
    if GROUP == 0:
        first = tl.load(planes[M] + row)  # eight rows interleaved, one group
    else:
        first = _shared(planes[M], row, column // GROUP, columns // GROUP, mask)
    if CENTER == ZEROS:
        value -= _shared(planes[M + 1], row, column // GROUP, columns // GROUP, mask).to(tl.float32)
    else:
        value -= CENTER
    if FORMAT == "q4_1" or FORMAT == "q5_1":
        scale, offset = _halves(first)
        return value * scale + offset

    block, blocks = column // 256, columns // 256
    byte = column % UNIT // 16 * 8  # where the byte of a half unit begins
    if FORMAT == "q4_k" or FORMAT == "q5_k":
        d, dmin = _halves(_shared(planes[M + 1], row, block, blocks, mask))
        return value * (d * (first & 0xFF).to(tl.float32)) - dmin * ((first >> 8) & 0xFF).to(tl.float32)
    elif FORMAT == "q2_k":
        d, dmin = _halves(_shared(planes[M + 1], row, block, blocks, mask))
        pair = first.to(tl.int32) >> byte
        return value * (d * (pair & 0xF).to(tl.float32)) - dmin * ((pair >> 4) & 0xF).to(tl.float32)
    elif FORMAT == "q3_k":
        top = (_shared(planes[M + 1], row, block, blocks, mask) >> (column % 256 // 16 * 2)) & 3
        d = _shared(planes[M + 2], row, block, blocks, mask).to(tl.float32)
        scale = ((first.to(tl.int32) >> (byte // 2)) & 0xF) | (top << 4)
        return value * (d * (scale - 32).to(tl.float32))
    elif FORMAT == "q6_k":
        d = _shared(planes[M + 1], row, block, blocks, mask).to(tl.float32)
        scale = (first.to(tl.int32) >> byte).to(tl.int8)  # the byte with its sign
        return value * (d * scale.to(tl.float32))
    else:
        return value * first.to(tl.float32)
