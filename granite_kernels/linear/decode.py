"""Packed weights become tensor-core registers: a lane takes 16 or 32 neighbours of a row, by one load of 128 bits where they fill it.

    weight = D * (scale * (code - center)) - E * low

scale and low belong to 16 or more columns, D and E (float32, k-quants alone) to 256. Because a lane knows its own columns' scale,
scale * (code - center) is formed in bfloat16 with one rounding, as a bfloat16 model rounds its weight. The lows of k-quants make a
fragment of their own, whose product with x comes out where the sums are.

A bfloat16 whose bits are an integer n below 256 is n * 2^-133: the numbers below the smallest normal one and those right above
it lie equally far apart. So the masked bits of a code are a number already, at bit 0 or, sixteen times as large, at bit 4 of their
half word, and one fused multiply-add scales and centers two codes. Scales carry 2^110, all weights 2^-23 until the sums are done.
Codes of two neighbours lie 16 bits apart in their word (formats/words.py). Shapes here: a value a lane [2 GROUPS, WARPS, 8, 4].
"""

from __future__ import annotations

import triton
import triton.language as tl

from granite_kernels.linear.scales import joined, load_stream, load_unit, times


def _pair(mask: int) -> tl.constexpr:
    """The pair under `mask` of word $2, times the pair $3, plus the pair $4, as bfloat16 $0 and $1."""
    return tl.constexpr(f"{{ .reg .b32 t; and.b32 t, $2, {mask:#x}; fma.rn.bf16x2 t, t, $3, $4; mov.b32 {{$0, $1}}, t; }}")


def _bytes(selector: int) -> tl.constexpr:
    """As `_pair`, of two bytes of word $2."""
    return tl.constexpr(f"{{ .reg .b32 t; prmt.b32 t, $2, 0, {selector:#x}; fma.rn.bf16x2 t, t, $3, $4; mov.b32 {{$0, $1}}, t; }}")


def _floats(selector: int) -> tl.constexpr:
    """Two e4m3 bytes of word $2: bits of theirs moved to bfloat16's places are 2^-120 of the value. Times the pair $3, plus $4."""
    return tl.constexpr(
        f"{{ .reg .b32 t, m; prmt.b32 t, $2, 0, {selector:#x}; shr.u32 m, t, 4; and.b32 m, m, 0x07F007F0; "
        "lop3.b32 t, t, 0x80008000, m, 0xEA; fma.rn.bf16x2 t, t, $3, $4; mov.b32 {$0, $1}, t; }"
    )


FOUR_AT_0, FOUR_AT_4 = _pair(0x000F000F), _pair(0x00F000F0)
TWO_AT_0, TWO_AT_2, TWO_AT_4, TWO_AT_6 = _pair(0x00030003), _pair(0x000C000C), _pair(0x00300030), _pair(0x00C000C0)
BYTES_01, BYTES_23, BYTES_02, BYTES_13 = _bytes(0x4140), _bytes(0x4342), _bytes(0x4240), _bytes(0x4341)
FLOATS_01, FLOATS_23 = _floats(0x1404), _floats(0x3424)


@triton.jit
def _scaled(TEXT: tl.constexpr, word, scale, offset):
    return tl.inline_asm_elementwise(TEXT, "=h,=h,r,r,r", [word, scale, offset], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1)


@triton.jit
def _four(words):
    """[..., 4] -> four of [...], which still come from one load."""
    shape: tl.constexpr = words.shape
    even, odd = tl.split(tl.reshape(words, (shape[0], shape[1], shape[2], shape[3], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _words(plane, first, g, unit, on, inside, MORE: tl.constexpr, UNITS: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """COUNT words of a unit, which is unit + on + MORE: [2 GROUPS, WARPS, 8, 4, COUNT]."""
    lane = (g * UNITS + unit)[:, :, :, :, None] * COUNT + tl.arange(0, COUNT)
    at = first[:, :, :, :, None] * (UNITS * COUNT) + lane
    return load_stream(plane + at + on * COUNT + MORE * COUNT, inside[:, :, :, :, None], EVEN)


@triton.jit
def load_codes(planes, first, g, unit, on, inside, MORE: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """The words of a lane's unit, which is unit + on + MORE of rows first + g: (lower bits, higher bits), tuples of one word to four."""
    if FORMAT == "q8_0" or FORMAT == "int8" or FORMAT == "fp8":
        words = _words(planes[0], first, g, unit, on, inside, MORE, COLUMNS // 16, 4, EVEN)
        return _four(words if FORMAT == "fp8" else words ^ -0x7F7F7F80), (0,)  # signed bytes as unsigned ones, 128 larger
    else:
        UNITS: tl.constexpr = COLUMNS // 32
        TWO_BITS: tl.constexpr = FORMAT == "q2_k" or FORMAT == "q3_k"
        WIDE: tl.constexpr = 2 if TWO_BITS else 4
        low = _words(planes[0], first, g, unit, on, inside, MORE, UNITS, WIDE, EVEN)
        if FORMAT == "q6_k":
            return _four(low), tl.split(_words(planes[1], first, g, unit, on, inside, MORE, UNITS, 2, EVEN))
        elif FORMAT == "q5_0" or FORMAT == "q5_1" or FORMAT == "q5_k" or FORMAT == "q3_k":
            high = load_unit(planes[1], first, g, unit, on, inside, MORE, UNITS, EVEN)
            return (tl.split(low) if TWO_BITS else _four(low)), (high,)
        else:
            return (tl.split(low) if TWO_BITS else _four(low)), (0,)


@triton.jit
def _moved(word, RIGHT: tl.constexpr):
    return word >> RIGHT if RIGHT >= 0 else word << -RIGHT


@triton.jit
def eight(low, high, scale, offset, J: tl.constexpr, FORMAT: tl.constexpr):
    """scale * (code - center) of the J-th eight elements of a unit: [2 GROUPS, WARPS, 8, 4, 8]."""
    if FORMAT == "q8_0" or FORMAT == "int8":
        a, b = _scaled(BYTES_01, low[2 * J], scale, offset)
        c, d = _scaled(BYTES_23, low[2 * J], scale, offset)
        e, f = _scaled(BYTES_01, low[2 * J + 1], scale, offset)
        g, h = _scaled(BYTES_23, low[2 * J + 1], scale, offset)
    elif FORMAT == "fp8":
        a, b = _scaled(FLOATS_01, low[2 * J], scale, offset)
        c, d = _scaled(FLOATS_23, low[2 * J], scale, offset)
        e, f = _scaled(FLOATS_01, low[2 * J + 1], scale, offset)
        g, h = _scaled(FLOATS_23, low[2 * J + 1], scale, offset)
    elif FORMAT == "q2_k":
        word = low[J // 2]
        quarter = times(scale, 0x3E803E80)
        if J % 2 == 0:
            a, b = _scaled(TWO_AT_0, word, scale, offset)
            c, d = _scaled(TWO_AT_2, word, quarter, offset)
            e, f = _scaled(TWO_AT_0, word >> 8, scale, offset)
            g, h = _scaled(TWO_AT_2, word >> 8, quarter, offset)
        else:
            sixteenth, least = times(scale, 0x3D803D80), times(quarter, 0x3D803D80)
            a, b = _scaled(TWO_AT_4, word, sixteenth, offset)
            c, d = _scaled(TWO_AT_6, word, least, offset)
            e, f = _scaled(TWO_AT_4, word >> 8, sixteenth, offset)
            g, h = _scaled(TWO_AT_6, word >> 8, least, offset)
    elif FORMAT == "q5_0" or FORMAT == "q5_1" or FORMAT == "q5_k" or FORMAT == "q6_k" or FORMAT == "q3_k":
        if FORMAT == "q6_k":
            first = low[J] & 0x0F0F0F0F | _moved(high[J // 2], 4 * (J % 2) - 4) & 0x30303030
            other = low[J] >> 4 & 0x0F0F0F0F | _moved(high[J // 2], 4 * (J % 2) - 2) & 0x30303030
        elif FORMAT == "q3_k":
            first = _moved(low[J // 2], 4 * (J % 2)) & 0x03030303 | _moved(high[0], 2 * J - 2) & 0x04040404
            other = _moved(low[J // 2], 4 * (J % 2) + 2) & 0x03030303 | _moved(high[0], 2 * J - 1) & 0x04040404
        else:
            first = low[J] & 0x0F0F0F0F | _moved(high[0], 2 * J - 4) & 0x10101010
            other = low[J] >> 4 & 0x0F0F0F0F | _moved(high[0], 2 * J - 3) & 0x10101010
        a, b = _scaled(BYTES_02, first, scale, offset)
        c, d = _scaled(BYTES_02, other, scale, offset)
        e, f = _scaled(BYTES_13, first, scale, offset)
        g, h = _scaled(BYTES_13, other, scale, offset)
    else:
        sixteenth = times(scale, 0x3D803D80)
        a, b = _scaled(FOUR_AT_0, low[J], scale, offset)
        c, d = _scaled(FOUR_AT_4, low[J], sixteenth, offset)
        e, f = _scaled(FOUR_AT_0, low[J] >> 8, scale, offset)
        g, h = _scaled(FOUR_AT_4, low[J] >> 8, sixteenth, offset)
    return joined(a, b, c, d, e, f, g, h)
