"""Packed weights become tensor-core registers: 128 columns of a row in four lanes, a unit of 32 in each.

    weight = D * (scale * (code - center)) - E * low

scale and low belong to 16 or more columns, D and E (float32, k-quants alone) to 256. A lane loads its unit whole, four bits a code
by one load of 128 bits, and its metadata; the k that a product of 32 takes together are then word j of four units, which asks only
that x be read alike. Because a lane knows its own unit's scale, scale * (code - center) is formed in bfloat16 with one rounding,
as a bfloat16 model rounds its weight. low makes a fragment of its own, whose product with x comes out where the sums are.

The codes of two neighbours lie 16 bits apart in their word (formats/words.py). Masked onto the pattern of 128 in bfloat16 they are
the pair 128 + code: one logical instruction. One fused multiply-add then takes 128 off and scales; two where the center is not
zero, as (128 + center) * scale would round. Shapes here: a value a lane [2 GROUPS, WARPS, 8, 4].
"""

from __future__ import annotations

import triton
import triton.language as tl

PACKED = ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
INT4 = ("int4_g32", "int4_g64", "int4_g128", "int4_g32_zero", "int4_g64_zero", "int4_g128_zero")
ONES, NOTHING = "0x3F803F80", "0x80008000"  # pairs of 1 and of -0


def _fields(low: int, high: int, *, centered: bool) -> tl.constexpr:
    """Assembly: the pair of codes in word $2 (and further bits in $3) times the pair `scale`, bfloat16 $0 and $1.

    Then come scale and an offset: -128 * scale or, centered, -(128 + center).
    """
    scale, offset = ("$4", "$5") if high else ("$3", "$4")
    text = f"{{ .reg .b32 t; lop3.b32 t, $2, {low * 0x10001:#x}, 0x43004300, 0xEA; "
    if high:
        text += f"lop3.b32 t, $3, {high * 0x10001:#x}, t, 0xEA; "
    if centered:
        text += f"fma.rn.bf16x2 t, t, one, {offset}; fma.rn.bf16x2 t, t, {scale}, nothing; "
        text = text.replace(".reg .b32 t;", f".reg .b32 t, one, nothing; mov.b32 one, {ONES}; mov.b32 nothing, {NOTHING};")
    else:
        text += f"fma.rn.bf16x2 t, t, {scale}, {offset}; "
    return tl.constexpr(text + "mov.b32 {$0, $1}, t; }")


FOUR, FOUR_CENTERED = _fields(0xF, 0, centered=False), _fields(0xF, 0, centered=True)
FIVE, FIVE_CENTERED = _fields(0xF, 0x10, centered=False), _fields(0xF, 0x10, centered=True)
TWO, THREE_CENTERED, SIX_CENTERED = _fields(0x3, 0, centered=False), _fields(0x3, 0x4, centered=True), _fields(0xF, 0x30, centered=True)

# the low byte of $1, below 128, as a pair: 128 + byte, less 128
UNSIGNED = tl.constexpr(
    f"{{ .reg .b32 t, m, one, less; mov.b32 m, 0x43; mov.b32 one, {ONES}; mov.b32 less, 0xC300C300; "
    "prmt.b32 t, $1, m, 0x4040; fma.rn.bf16x2 $0, t, one, less; }"
)
# the low byte of $2, below 64, as the pair ($0, $1), made in two ways: the tensor cores want it in two registers, and of one value
# ptxas would make the second anew for every instruction. 512 + 4 * byte, a quarter, less 128
AGAIN = tl.constexpr(
    "{ .reg .b32 t, m, quarter, less; mov.b32 m, 0x44; mov.b32 quarter, 0x3E803E80; mov.b32 less, 0xC300C300; "
    "prmt.b32 t, $2, m, 0x4040; fma.rn.bf16x2 t, t, quarter, less; mov.b32 {$0, $1}, t; }"
)
ONCE = tl.constexpr(
    f"{{ .reg .b32 t, m, one, less; mov.b32 m, 0x43; mov.b32 one, {ONES}; mov.b32 less, 0xC300C300; "
    "prmt.b32 t, $2, m, 0x4040; fma.rn.bf16x2 t, t, one, less; mov.b32 {$0, $1}, t; }"
)
# the low byte of $1 with its sign, as a pair: its lower bits make 128 + (byte & 127), its sign 128 or 256, the latter taken off
SIGNED = tl.constexpr(
    "{ .reg .b32 t, a, b, minus; mov.b32 minus, 0xBF80BF80; prmt.b32 t, $1, 0, 0x4040; "
    "lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA; fma.rn.bf16x2 $0, b, minus, a; }"
)
TIMES_MINUS_128 = tl.constexpr(
    f"{{ .reg .b32 t, nothing; mov.b32 t, 0xC300C300; mov.b32 nothing, {NOTHING}; fma.rn.bf16x2 $0, $1, t, nothing; }}"
)


@triton.jit
def _word(TEXT: tl.constexpr, word):
    return tl.inline_asm_elementwise(TEXT, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _twice(value):
    """A value rounded to bfloat16, as a pair."""
    return tl.inline_asm_elementwise("mov.b32 $0, {$1, $1};", "=r,h", [value.to(tl.bfloat16)], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _pair_of(TEXT: tl.constexpr, word):
    return tl.inline_asm_elementwise(TEXT, "=h,=h,r", [word], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1)


@triton.jit
def _least(word):
    """The low byte of a word, below 64, as a tile [2 GROUPS, WARPS, 8, 4, 8] of eight equal elements."""
    a, b = _pair_of(ONCE, word)
    c, d = _pair_of(AGAIN, word)
    return _joined(a, b, c, d, a, b, c, d)


@triton.jit
def _joined(a, b, c, d, e, f, g, h):
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
def _two(words):
    """[..., 2] -> two of [...], which still come from one load."""
    return tl.split(words)


@triton.jit
def _four(words):
    shape: tl.constexpr = words.shape
    even, odd = tl.split(tl.reshape(words, (shape[0], shape[1], shape[2], shape[3], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def load_stream(pointers, inside, EVEN: tl.constexpr):
    """What is read once: zero where it is not `inside`, which is everywhere if EVEN."""
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def load_codes(planes, row, unit, inside, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """The words of a lane's unit: (lower bits, higher bits), tuples of one word to four."""
    UNITS: tl.constexpr = COLUMNS // 32
    TWO_BITS: tl.constexpr = FORMAT == "q2_k" or FORMAT == "q3_k"
    WIDE: tl.constexpr = 2 if TWO_BITS else 4
    at = (row * UNITS + unit)[:, :, :, :, None]
    low = load_stream(planes[0] + at * WIDE + tl.arange(0, WIDE), inside[:, :, :, :, None], EVEN)
    if FORMAT == "q6_k":
        high = load_stream(planes[1] + at * 2 + tl.arange(0, 2), inside[:, :, :, :, None], EVEN)
        return _four(low), _two(high)
    elif FORMAT == "q5_0" or FORMAT == "q5_1" or FORMAT == "q5_k" or FORMAT == "q3_k":
        high = load_unit(planes[1], row, unit, inside, UNITS, EVEN)
        return (_two(low) if TWO_BITS else _four(low)), (high,)
    else:
        return (_two(low) if TWO_BITS else _four(low)), (0,)


@triton.jit
def load_unit(plane, row, index, inside, LENGTH: tl.constexpr, EVEN: tl.constexpr):
    """Value `index` of LENGTH of each row of an interleaved plane [rows / 8, LENGTH, 8]."""
    # told that rows are neighbours, Triton would give lanes along them two values each and shuffle these to where codes are
    at = (row // 8 * LENGTH + index) * 8 + row % 8
    return load_stream(plane + tl.max_contiguous(at, [1] * len(at.shape)), inside, EVEN)


@triton.jit
def load_scales(planes, row, unit, inside, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """(scale, offset, low) of the first 16 columns of a lane's unit, and of the last 16: pairs, pairs, a tile or 0."""
    UNITS: tl.constexpr = COLUMNS // 32
    if FORMAT == "q4_k" or FORMAT == "q5_k":
        word = load_unit(planes[1 if FORMAT == "q4_k" else 2], row, unit, inside, UNITS, EVEN).to(tl.int32)
        scale = _word(UNSIGNED, word)
        first = (scale, _word(TIMES_MINUS_128, scale), _least(word >> 8))
        return first, first
    elif FORMAT == "q2_k":
        word = load_unit(planes[1], row, unit, inside, UNITS, EVEN).to(tl.int32)
        scale, other = _word(UNSIGNED, word & 15), _word(UNSIGNED, (word >> 8) & 15)
        first = (scale, _word(TIMES_MINUS_128, scale), _least((word >> 4) & 15))
        return first, (other, _word(TIMES_MINUS_128, other), _least((word >> 12) & 15))
    elif FORMAT == "q6_k":
        word = load_unit(planes[2], row, unit, inside, UNITS, EVEN).to(tl.int32)
        offset = tl.full(word.shape, -0x3CDF3CE0, tl.int32)  # -160 twice
        return (_word(SIGNED, word), offset, 0), (_word(SIGNED, word >> 8), offset, 0)
    elif FORMAT == "q3_k":
        nibbles = load_unit(planes[2], row, unit, inside, UNITS, EVEN).to(tl.int32)
        tops = load_unit(planes[3], row, unit // 8, inside, UNITS // 8, EVEN) >> (unit % 8 * 4)
        offset = tl.full(nibbles.shape, -0x3CFB3CFC, tl.int32)  # -132 twice
        scale = (nibbles & 15 | (tops & 3) << 4) - 32
        other = (nibbles >> 4 & 15 | (tops & 12) << 2) - 32
        return (_word(SIGNED, scale), offset, 0), (_word(SIGNED, other), offset, 0)
    elif FORMAT == "q4_1" or FORMAT == "q5_1":
        word = load_unit(planes[1 if FORMAT == "q4_1" else 2], row, unit, inside, UNITS, EVEN)
        scale = _twice(half_low(word))
        low = half_high(word).to(tl.bfloat16)
        first = (scale, _word(TIMES_MINUS_128, scale), _joined(low, low, low, low, low, low, low, low))
        return first, first
    elif FORMAT == "q4_0" or FORMAT == "q5_0":
        scale = _twice(load_unit(planes[1 if FORMAT == "q4_0" else 2], row, unit, inside, UNITS, EVEN).to(tl.float32))
        # -136 or -144, twice
        first = (scale, tl.full(scale.shape, -0x3CF73CF8 if FORMAT == "q4_0" else -0x3CEF3CF0, tl.int32), 0)
        return first, first
    else:
        WIDTH: tl.constexpr = (
            1 if FORMAT == "int4_g32" or FORMAT == "int4_g32_zero" else (2 if FORMAT == "int4_g64" or FORMAT == "int4_g64_zero" else 4)
        )
        scale = _twice(load_unit(planes[1], row, unit // WIDTH, inside, UNITS // WIDTH, EVEN).to(tl.float32))
        if FORMAT == "int4_g32" or FORMAT == "int4_g64" or FORMAT == "int4_g128":
            first = (scale, tl.full(scale.shape, -0x3CF73CF8, tl.int32), 0)
        else:
            zero = load_unit(planes[2], row, unit // WIDTH, inside, UNITS // WIDTH, EVEN).to(tl.int32)
            first = (scale, (zero | zero << 16) ^ -0x3CFF3D00, 0)  # the pair -(128 + zero)
        return first, first


@triton.jit
def _pair(low, high, scale, offset, J: tl.constexpr, P: tl.constexpr, FORMAT: tl.constexpr):
    """Elements 2 P and 2 P + 1 of word J's eight, bfloat16."""
    TWO_AT: tl.constexpr = 8 * (P // 2) + 4 * (J % 2) + 2 * (P % 2)
    ONE_AT: tl.constexpr = 8 * (P // 2) + 2 * J + P % 2
    if FORMAT == "q2_k" or FORMAT == "q3_k":
        word = low[J // 2] >> TWO_AT
    else:
        word = low[J] >> (4 * P)
    if FORMAT == "q6_k":
        other = _moved(high[J // 2], TWO_AT - 4)
        return _scaled(SIX_CENTERED, word, other, scale, offset)
    elif FORMAT == "q3_k":
        return _scaled(THREE_CENTERED, word, _moved(high[0], ONE_AT - 2), scale, offset)
    elif FORMAT == "q5_0":
        return _scaled(FIVE_CENTERED, word, _moved(high[0], ONE_AT - 4), scale, offset)
    elif FORMAT == "q5_1" or FORMAT == "q5_k":
        return _scaled(FIVE, word, _moved(high[0], ONE_AT - 4), scale, offset)
    else:
        TEXT: tl.constexpr = TWO if FORMAT == "q2_k" else (FOUR if FORMAT == "q4_k" or FORMAT == "q4_1" else FOUR_CENTERED)
        return tl.inline_asm_elementwise(TEXT, "=h,=h,r,r,r", [word, scale, offset], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1)


@triton.jit
def _moved(word, RIGHT: tl.constexpr):
    return word >> RIGHT if RIGHT >= 0 else word << -RIGHT


@triton.jit
def _scaled(TEXT: tl.constexpr, word, other, scale, offset):
    return tl.inline_asm_elementwise(
        TEXT, "=h,=h,r,r,r,r", [word, other, scale, offset], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
    )


@triton.jit
def eight(low, high, scale, offset, J: tl.constexpr, FORMAT: tl.constexpr):
    """scale * (code - center) of the eight elements of word J: [2 GROUPS, WARPS, 8, 4, 8]."""
    a, b = _pair(low, high, scale, offset, J, 0, FORMAT)
    c, d = _pair(low, high, scale, offset, J, 1, FORMAT)
    e, f = _pair(low, high, scale, offset, J, 2, FORMAT)
    g, h = _pair(low, high, scale, offset, J, 3, FORMAT)
    return _joined(a, b, c, d, e, f, g, h)


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
