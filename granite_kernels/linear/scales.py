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

MARK = tl.constexpr(0x430000)  # bfloat16's exponent for 128, two bytes above a byte that is to become its fraction


def _unsigned(byte: int) -> tl.constexpr:
    """A byte of a marked word $1, below 128, as a pair times 2^110: 128 + byte, less 128."""
    return tl.constexpr(
        "{ .reg .b32 t, up, less; mov.b32 up, 0x76807680; mov.b32 less, 0xFA00FA00; "
        f"prmt.b32 t, $1, 0, {0x2020 + byte * 0x101:#x}; fma.rn.bf16x2 $0, t, up, less; }}"
    )


def _once(byte: int) -> tl.constexpr:
    """A byte of word $2 as the pair ($0, $1) times 2^-23."""
    return tl.constexpr(
        f"{{ .reg .b32 t, up, nothing; mov.b32 up, 0x76807680; {NOTHING}"
        f"prmt.b32 t, $2, 0, {0x4040 + byte * 0x101:#x}; fma.rn.bf16x2 t, t, up, nothing; mov.b32 {{$0, $1}}, t; }}"
    )


def _again(byte: int) -> tl.constexpr:
    """The same of a marked word by another way: the tensor cores want it in two registers, and of one value ptxas would make the
    second anew for every instruction.
    """
    return tl.constexpr(
        "{ .reg .b32 t, up, less; mov.b32 up, 0x34003400; mov.b32 less, 0xB780B780; "
        f"prmt.b32 t, $2, 0, {0x2020 + byte * 0x101:#x}; fma.rn.bf16x2 t, t, up, less; mov.b32 {{$0, $1}}, t; }}"
    )


UNSIGNED_0, UNSIGNED_1, ONCE_0, ONCE_1, AGAIN_0, AGAIN_1 = _unsigned(0), _unsigned(1), _once(0), _once(1), _again(0), _again(1)
# the low byte of $1 with its sign as a pair times 2^110: its lower bits make 128 + (byte & 127), its sign 128 or 256, the latter taken off
SIGNED = tl.constexpr(
    "{ .reg .b32 t, a, b, up; mov.b32 up, 0x76807680; prmt.b32 t, $1, 0, 0x4040; "
    "lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, t, 0x00800080, 0xFA00FA00, 0xEA; fma.rn.bf16x2 $0, a, up, b; }"
)
TIMES = tl.constexpr(f"{{ .reg .b32 nothing; {NOTHING}fma.rn.bf16x2 $0, $1, $2, nothing; }}")


@triton.jit
def _word(TEXT: tl.constexpr, word):
    return tl.inline_asm_elementwise(TEXT, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _byte(value):
    """A stored byte as int32, behind an instruction that ends the compiler's search for where the tensor cores' operand comes from:
    finding 8 bits, it would give threads 8 consecutive k, and shuffle.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


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
def _least(ONCE: tl.constexpr, AGAIN: tl.constexpr, word):
    """A byte of a marked word, below 64, as a tile [2 GROUPS, WARPS, 8, 4, 8] of eight equal elements."""
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
def load_unit(plane, first, g, index, on, inside, MORE: tl.constexpr, LENGTH: tl.constexpr, EVEN: tl.constexpr):
    """Value index + on + MORE of LENGTH of rows first + g of an interleaved plane [rows / 8, LENGTH, 8].

    `first`, a multiple of 8, is the same for all lanes, and `index` stays while a loop moves `on`: so most of an address is made once.
    """
    # told that rows are neighbours, Triton would give lanes along them two values each and shuffle these to where codes are
    at = tl.max_contiguous(first * LENGTH + (index * 8 + g), [1] * len(inside.shape))
    return load_stream(plane + at + on * 8 + MORE * 8, inside, EVEN)


@triton.jit
def load_scales(planes, first, g, unit, on, inside, MORE: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """(scale, offset, low) of the first half of a lane's unit, which is unit + on + MORE, and of the second: pairs, pairs, a tile or 0.

    offset is -center * scale, or what is added to weights.
    """
    UNITS: tl.constexpr = COLUMNS // 32
    if FORMAT == "q4_k" or FORMAT == "q5_k":
        word = load_unit(planes[1 if FORMAT == "q4_k" else 2], first, g, unit, on, inside, MORE, UNITS, EVEN).to(tl.int32)
        word = word & 0xFFFF | MARK
        scale = _word(UNSIGNED_0, word)
        whole = (scale, tl.full(scale.shape, -0x7FFF8000, tl.int32), _least(ONCE_1, AGAIN_1, word))
        return whole, whole
    elif FORMAT == "q2_k":
        word = load_unit(planes[1], first, g, unit, on, inside, MORE, UNITS, EVEN).to(tl.int32)
        nothing = tl.full(word.shape, -0x7FFF8000, tl.int32)
        word, low = word & 0x0F0F | MARK, (word >> 4) & 0x0F0F | MARK
        whole = (_word(UNSIGNED_0, word), nothing, _least(ONCE_0, AGAIN_0, low))
        return whole, (_word(UNSIGNED_1, word), nothing, _least(ONCE_1, AGAIN_1, low))
    elif FORMAT == "q6_k":
        word = load_unit(planes[2], first, g, unit, on, inside, MORE, UNITS, EVEN).to(tl.int32)
        scale, other = _word(SIGNED, word), _word(SIGNED, word >> 8)
        return (scale, times(scale, -0x7FDF7FE0), 0), (other, times(other, -0x7FDF7FE0), 0)  # -32 * 2^-133
    elif FORMAT == "q3_k":
        nibbles = _byte(load_unit(planes[2], first, g, unit, on, inside, MORE, UNITS, EVEN))
        tops = load_unit(planes[3], first, g, unit // 8, on // 8, inside, MORE // 8, UNITS // 8, EVEN) >> ((unit + on + MORE) % 8 * 4)
        scale = _word(SIGNED, (nibbles & 15 | (tops & 3) << 4) - 32)
        other = _word(SIGNED, (nibbles >> 4 & 15 | (tops & 12) << 2) - 32)
        return (scale, times(scale, -0x7FFB7FFC), 0), (other, times(other, -0x7FFB7FFC), 0)  # -4 * 2^-133
    elif FORMAT == "q4_1" or FORMAT == "q5_1":
        word = load_unit(planes[1 if FORMAT == "q4_1" else 2], first, g, unit, on, inside, MORE, UNITS, EVEN)
        whole = (_twice(half_low(word) * UP), _twice(half_high(word) * DOWN), 0)
        return whole, whole
    elif FORMAT == "q4_0" or FORMAT == "q5_0":
        scale = _twice(load_unit(planes[1 if FORMAT == "q4_0" else 2], first, g, unit, on, inside, MORE, UNITS, EVEN).to(tl.float32) * UP)
        whole = (scale, times(scale, -0x7FF77FF8 if FORMAT == "q4_0" else -0x7FEF7FF0), 0)  # -8 or -16, times 2^-133
        return whole, whole
    elif FORMAT == "q8_0":
        scale = _twice(load_unit(planes[1], first, g, unit // 2, on // 2, inside, MORE // 2, UNITS, EVEN).to(tl.float32) * UP)
        whole = (scale, times(scale, -0x7F7F7F80), 0)  # -128 * 2^-133
        return whole, whole
    elif FORMAT == "int8":
        whole = (tl.full(unit.shape, 0x76807680, tl.int32), tl.full(unit.shape, -0x487F4880, tl.int32), 0)  # UP; -128 * DOWN
        return whole, whole
    elif FORMAT == "fp8":
        whole = (tl.full(unit.shape, 0x70007000, tl.int32), tl.full(unit.shape, -0x7FFF8000, tl.int32), 0)  # 2^97
        return whole, whole
    else:
        WIDTH: tl.constexpr = (
            1 if FORMAT == "int4_g32" or FORMAT == "int4_g32_zero" else (2 if FORMAT == "int4_g64" or FORMAT == "int4_g64_zero" else 4)
        )
        scale = _twice(
            load_unit(planes[1], first, g, unit // WIDTH, on // WIDTH, inside, MORE // WIDTH, UNITS // WIDTH, EVEN).to(tl.float32) * UP
        )
        if FORMAT == "int4_g32" or FORMAT == "int4_g64" or FORMAT == "int4_g128":
            whole = (scale, times(scale, -0x7FF77FF8), 0)
        else:
            zero = _byte(load_unit(planes[2], first, g, unit // WIDTH, on // WIDTH, inside, MORE // WIDTH, UNITS // WIDTH, EVEN))
            pair = (zero | zero << 16) | -0x7FFF8000  # -zero * 2^-133, twice
            whole = (scale, tl.inline_asm_elementwise(TIMES, "=r,r,r", [scale, pair], dtype=tl.int32, is_pure=True, pack=1), 0)
        return whole, whole


@triton.jit
def load_groups(plane, rows, index, on, inside, LENGTH: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr):
    """As load_unit, for the rows of the sums: index [WARPS, 1] -> [WARPS, 16 GROUPS].

    In pieces of 16 rows: a load of fewer values than there are threads is done by whom the sums belong to, a larger one by others.
    """
    g = (tl.arange(0, 16) % 8)[None, :]
    a = load_unit(plane, rows[0][None, :], g, index, on, inside, 0, LENGTH, EVEN)
    if GROUPS == 1:
        return a
    else:
        b = load_unit(plane, rows[1][None, :], g, index, on, inside, 0, LENGTH, EVEN)
        if GROUPS == 2:
            return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 32))
        else:
            c = load_unit(plane, rows[2][None, :], g, index, on, inside, 0, LENGTH, EVEN)
            d = load_unit(plane, rows[3][None, :], g, index, on, inside, 0, LENGTH, EVEN)
            return tl.reshape(tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1)), (a.shape[0], 64))


@triton.jit
def super_scales(
    planes, rows, block, on, inside, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """(D, E) float32 of 256 columns, block + on of its row."""
    LENGTH: tl.constexpr = COLUMNS // 256
    if FORMAT == "q6_k":
        return load_groups(planes[3], rows, block, on, inside, LENGTH, EVEN, GROUPS).to(tl.float32), 0.0
    elif FORMAT == "q3_k":
        return load_groups(planes[4], rows, block, on, inside, LENGTH, EVEN, GROUPS).to(tl.float32), 0.0
    else:
        word = load_groups(planes[3 if FORMAT == "q5_k" else 2], rows, block, on, inside, LENGTH, EVEN, GROUPS)
        return half_low(word), half_high(word)
