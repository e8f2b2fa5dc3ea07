"""The scales of packed weights, as the lanes that hold the codes (decode.py) and those that hold the sums need them.

Those of a lane's own columns come as pairs of equal bfloat16, times 2^110; what is added to products, -center * scale or the
minimum, times 2^-23. Shapes: a value a lane [2 GROUPS, WARPS, 8, 4].
"""

from __future__ import annotations

import triton
import triton.language as tl

UP = tl.constexpr(2.0**110)
DOWN = tl.constexpr(2.0**-23)  # what is left of UP and of the integers' 2^-133
NOTHING = "mov.b32 nothing, 0x80008000; "  # a pair of -0: what is added to a product

# the low byte of $1, below 128, as a pair times 2^110: 128 + byte, less 128
UNSIGNED = tl.constexpr(
    "{ .reg .b32 t, m, up, less; mov.b32 m, 0x43; mov.b32 up, 0x76807680; mov.b32 less, 0xFA00FA00; "
    "prmt.b32 t, $1, m, 0x4040; fma.rn.bf16x2 $0, t, up, less; }"
)
# the low byte of $1 with its sign, likewise: its lower bits make 128 + (byte & 127), its sign 128 or 256, the latter taken off
SIGNED = tl.constexpr(
    "{ .reg .b32 t, a, b, up; mov.b32 up, 0x76807680; prmt.b32 t, $1, 0, 0x4040; "
    "lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, t, 0x00800080, 0xFA00FA00, 0xEA; fma.rn.bf16x2 $0, a, up, b; }"
)
# the low byte of $2 as the pair ($0, $1) times 2^-23, made in two ways: the tensor cores want it in two registers, and of one value
# ptxas would make the second anew for every instruction
ONCE = tl.constexpr(
    f"{{ .reg .b32 t, up, nothing; mov.b32 up, 0x76807680; {NOTHING}"
    "prmt.b32 t, $2, 0, 0x4040; fma.rn.bf16x2 t, t, up, nothing; mov.b32 {$0, $1}, t; }"
)
AGAIN = tl.constexpr(
    "{ .reg .b32 t, m, up, less; mov.b32 m, 0x43; mov.b32 up, 0x34003400; mov.b32 less, 0xB780B780; "
    "prmt.b32 t, $2, m, 0x4040; fma.rn.bf16x2 t, t, up, less; mov.b32 {$0, $1}, t; }"
)
TIMES = tl.constexpr(f"{{ .reg .b32 nothing; {NOTHING}fma.rn.bf16x2 $0, $1, $2, nothing; }}")


@triton.jit
def _word(TEXT: tl.constexpr, word):
    return tl.inline_asm_elementwise(TEXT, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def times(pair, FACTOR: tl.constexpr):
    """A pair times the pair whose bits are FACTOR."""
    other = tl.full(pair.shape, FACTOR, tl.int32)
    return tl.inline_asm_elementwise(TIMES, "=r,r,r", [pair, other], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _twice(value):
    """A value rounded to bfloat16, as a pair."""
    return tl.inline_asm_elementwise("mov.b32 $0, {$1, $1};", "=r,h", [value.to(tl.bfloat16)], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _least(word):
    """The low byte of a word, below 64, as a tile [2 GROUPS, WARPS, 8, 4, 8] of eight equal elements."""
    a, b = tl.inline_asm_elementwise(ONCE, "=h,=h,r", [word], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1)
    c, d = tl.inline_asm_elementwise(AGAIN, "=h,=h,r", [word], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1)
    return joined(a, b, c, d, a, b, c, d)


@triton.jit
def joined(a, b, c, d, e, f, g, h):
    """Eight tensors as the elements of a tile's last dimension."""
    joined = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    return tl.reshape(tl.permute(joined, (0, 1, 2, 3, 6, 5, 4)), (a.shape[0], a.shape[1], 8, 4, 8))


@triton.jit
def half_low(word):
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half_high(word):
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_stream(pointers, inside, EVEN: tl.constexpr):
    """What is read once: zero where it is not `inside`, which is everywhere if EVEN."""
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def load_unit(plane, row, index, inside, LENGTH: tl.constexpr, EVEN: tl.constexpr):
    """Value `index` of LENGTH of each row of an interleaved plane [rows / 8, LENGTH, 8]."""
    # told that rows are neighbours, Triton would give lanes along them two values each and shuffle these to where codes are
    at = (row // 8 * LENGTH + index) * 8 + row % 8
    return load_stream(plane + tl.max_contiguous(at, [1] * len(at.shape)), inside, EVEN)


@triton.jit
def load_scales(planes, row, unit, inside, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """(scale, offset, low) of the first half of a lane's unit, and of the second: pairs, pairs, a tile or 0.

    offset is -center * scale, or what is added to weights.
    """
    UNITS: tl.constexpr = COLUMNS // 32
    if FORMAT == "q4_k" or FORMAT == "q5_k":
        word = load_unit(planes[1 if FORMAT == "q4_k" else 2], row, unit, inside, UNITS, EVEN).to(tl.int32)
        scale = _word(UNSIGNED, word)
        first = (scale, tl.full(scale.shape, -0x7FFF8000, tl.int32), _least(word >> 8))
        return first, first
    elif FORMAT == "q2_k":
        word = load_unit(planes[1], row, unit, inside, UNITS, EVEN).to(tl.int32)
        nothing = tl.full(word.shape, -0x7FFF8000, tl.int32)
        first = (_word(UNSIGNED, word & 15), nothing, _least((word >> 4) & 15))
        return first, (_word(UNSIGNED, (word >> 8) & 15), nothing, _least((word >> 12) & 15))
    elif FORMAT == "q6_k":
        word = load_unit(planes[2], row, unit, inside, UNITS, EVEN).to(tl.int32)
        scale, other = _word(SIGNED, word), _word(SIGNED, word >> 8)
        return (scale, times(scale, -0x7FDF7FE0), 0), (other, times(other, -0x7FDF7FE0), 0)  # -32 * 2^-133
    elif FORMAT == "q3_k":
        nibbles = load_unit(planes[2], row, unit, inside, UNITS, EVEN).to(tl.int32)
        tops = load_unit(planes[3], row, unit // 8, inside, UNITS // 8, EVEN) >> (unit % 8 * 4)
        scale = _word(SIGNED, (nibbles & 15 | (tops & 3) << 4) - 32)
        other = _word(SIGNED, (nibbles >> 4 & 15 | (tops & 12) << 2) - 32)
        return (scale, times(scale, -0x7FFB7FFC), 0), (other, times(other, -0x7FFB7FFC), 0)  # -4 * 2^-133
    elif FORMAT == "q4_1" or FORMAT == "q5_1":
        word = load_unit(planes[1 if FORMAT == "q4_1" else 2], row, unit, inside, UNITS, EVEN)
        first = (_twice(half_low(word) * UP), _twice(half_high(word) * DOWN), 0)
        return first, first
    elif FORMAT == "q4_0" or FORMAT == "q5_0":
        scale = _twice(load_unit(planes[1 if FORMAT == "q4_0" else 2], row, unit, inside, UNITS, EVEN).to(tl.float32) * UP)
        first = (scale, times(scale, -0x7FF77FF8 if FORMAT == "q4_0" else -0x7FEF7FF0), 0)  # -8 or -16, times 2^-133
        return first, first
    elif FORMAT == "q8_0":
        scale = _twice(load_unit(planes[1], row, unit // 2, inside, UNITS, EVEN).to(tl.float32) * UP)
        first = (scale, times(scale, -0x7F7F7F80), 0)  # -128 * 2^-133
        return first, first
    elif FORMAT == "int8":
        first = (tl.full(unit.shape, 0x76807680, tl.int32), tl.full(unit.shape, -0x487F4880, tl.int32), 0)  # UP; -128 * DOWN
        return first, first
    elif FORMAT == "fp8":
        first = (tl.full(unit.shape, 0x70007000, tl.int32), tl.full(unit.shape, -0x7FFF8000, tl.int32), 0)  # 2^97
        return first, first
    else:
        WIDTH: tl.constexpr = (
            1 if FORMAT == "int4_g32" or FORMAT == "int4_g32_zero" else (2 if FORMAT == "int4_g64" or FORMAT == "int4_g64_zero" else 4)
        )
        scale = _twice(load_unit(planes[1], row, unit // WIDTH, inside, UNITS // WIDTH, EVEN).to(tl.float32) * UP)
        if FORMAT == "int4_g32" or FORMAT == "int4_g64" or FORMAT == "int4_g128":
            first = (scale, times(scale, -0x7FF77FF8), 0)
        else:
            zero = load_unit(planes[2], row, unit // WIDTH, inside, UNITS // WIDTH, EVEN).to(tl.int32)
            pair = (zero | zero << 16) | -0x7FFF8000  # -zero * 2^-133, twice
            first = (scale, tl.inline_asm_elementwise(TIMES, "=r,r,r", [scale, pair], dtype=tl.int32, is_pure=True, pack=1), 0)
        return first, first


@triton.jit
def load_groups(plane, rows, index, inside, LENGTH: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr):
    """As load_unit, for the rows of the sums: index [WARPS, 1] -> [WARPS, 16 GROUPS].

    In pieces of 16 rows: a load of fewer values than there are threads is done by whom the sums belong to, a larger one by others.
    """
    a = load_unit(plane, rows[0][None, :], index, inside, LENGTH, EVEN)
    if GROUPS == 1:
        return a
    else:
        b = load_unit(plane, rows[1][None, :], index, inside, LENGTH, EVEN)
        if GROUPS == 2:
            return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 32))
        else:
            c = load_unit(plane, rows[2][None, :], index, inside, LENGTH, EVEN)
            d = load_unit(plane, rows[3][None, :], index, inside, LENGTH, EVEN)
            return tl.reshape(tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1)), (a.shape[0], 64))


@triton.jit
def super_scales(planes, rows, block, inside, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr):
    """(D, E) float32 of 256 columns, `block` of its row."""
    LENGTH: tl.constexpr = COLUMNS // 256
    if FORMAT == "q6_k":
        return load_groups(planes[3], rows, block, inside, LENGTH, EVEN, GROUPS).to(tl.float32), 0.0
    elif FORMAT == "q3_k":
        return load_groups(planes[4], rows, block, inside, LENGTH, EVEN, GROUPS).to(tl.float32), 0.0
    else:
        word = load_groups(planes[3 if FORMAT == "q5_k" else 2], rows, block, inside, LENGTH, EVEN, GROUPS)
        return half_low(word), half_high(word)
