"""The values of a packed weight's tile, in natural order: what a gather, a copy and a tiled product ask for.

    value = scale * code - low

A thread holds whole units of 32 columns. Doubling a tile by joining it with itself shifted opens one level of the order in
words.py, so that five joins lay out a unit's codes and no value moves between threads. All products of a code and a scale are
exact in float32, so that the results equal the format's `unpack` with fused instructions or without.

Planes, their order and the position of a code in its word: formats/base.py, formats/words.py; the formulas: formats/<format>.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels import formats
from granite_kernels.formats.base import ROW

UNIT = tl.constexpr(32)
ZEROS = tl.constexpr(-1)


def constants(format: str) -> dict[str, int]:
    """What `tile_values` must know of a format: bits of a code in the first plane and in the second (0: there is none), columns
    that share a value of the first metadata plane (0: the row), and what is taken off a code (ZEROS: a plane says)."""
    found = formats.get(format)
    low, high = (*found.code_bits, 0)[:2]
    centers = {"q3_k": 4, "q4_0": 8, "q5_0": 16, "q6_k": 32}
    center = (ZEROS.value if format.endswith("_zero") else 8) if format.startswith("int4") else centers.get(format, 0)
    return {"LOW": low, "HIGH": high, "GROUP": 0 if found.metadata[0].width == ROW else found.metadata[0].width, "CENTER": center}


def as_words(planes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Planes as `tile_values` takes them: codes of 8 bits as words of four."""
    codes, *metadata = planes
    return (codes.view(torch.int32), *metadata)


@triton.jit
def _load(pointers, inside):
    """None: all are inside."""
    if inside is None:
        return tl.load(pointers)
    elif len(pointers.shape) > len(inside.shape):
        return tl.load(pointers, mask=inside[:, :, None], other=0)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def _shared(plane, row, group, inside, GROUPS: tl.constexpr):
    """Value `group` of GROUPS of each row of an interleaved plane [rows / 8, GROUPS, 8]."""
    at = (row // 8 * GROUPS + group) * 8 + row % 8
    return _load(plane + tl.max_contiguous(at, [1, 1]), inside)


@triton.jit
def _half(word):
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _e4m3(byte):
    """float8_e4m3fn, which no architecture below 8.9 converts: a float16 but for the exponent's bias. No weight is NaN."""
    return _half(((byte & 0x7F) << 7) | ((byte & 0x80) << 8)) * 256.0


@triton.jit
def _again(tile):
    return tl.join(tile, tile)


@triton.jit
def _codes(planes, row, unit, inside, COLUMNS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes int32 [R, U, 2, 2, 2, 2, 2]; of 8 bits in the low byte of each, what else there is being left over."""
    UNITS: tl.constexpr = COLUMNS // UNIT
    R: tl.constexpr = row.shape[0]
    U: tl.constexpr = unit.shape[1]
    word = tl.arange(0, LOW)[None, None, :]
    words = _load(planes[0] + ((row * UNITS + unit)[:, :, None] * LOW + word), inside)
    if LOW == 8:  # two words an octet
        words = tl.reshape(words, (R, U, 2, 2, 2))
        words = tl.join(words, words >> 16)
        return tl.join(words, words >> 8)
    else:
        if LOW == 4:
            words = tl.reshape(words, (R, U, 2, 2))
        else:  # two octets a word
            words = tl.join(words, words >> 4)
        words = tl.join(words, words >> 8)
        words = tl.join(words, words >> LOW)
        codes = tl.join(words, words >> 16) & ((1 << LOW) - 1)
        if HIGH > 0:  # above the lower bits, where the first join puts them
            if HIGH == 1:
                bits = _shared(planes[1], row, unit, inside, UNITS)
                bits = tl.join(bits << LOW, bits >> (4 - LOW))
                bits = tl.join(bits, bits >> 2)
            else:
                pair = tl.arange(0, 2)[None, None, :]
                bits = _load(planes[1] + ((row * UNITS + unit)[:, :, None] * 2 + pair), inside)
                bits = tl.join(bits << LOW, bits >> (4 - LOW))
            bits = tl.join(bits, bits >> 8)
            bits = tl.join(bits, bits >> HIGH)
            codes |= tl.join(bits, bits >> 16) & (((1 << HIGH) - 1) << LOW)
        return codes


@triton.jit
def _scales(
    planes, row, unit, inside, COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """scale and low, float32 [R, U] for the whole unit, or [R, U, 2] for its halves."""
    M: tl.constexpr = 1 if HIGH == 0 else 2  # the first metadata plane
    BLOCKS: tl.constexpr = COLUMNS // 256
    if GROUP == 0:
        return _shared(planes[M], row, unit * 0, inside, 1), 0.0
    else:
        first = _shared(planes[M], row, unit * UNIT // GROUP, inside, COLUMNS // GROUP)
        if FORMAT == "q4_1" or FORMAT == "q5_1":
            return _half(first), -_half(first >> 16)
        elif FORMAT == "q4_k" or FORMAT == "q5_k":
            pair, dm = first.to(tl.int32), _shared(planes[M + 1], row, unit // 8, inside, BLOCKS)
            return _half(dm) * (pair & 0xFF).to(tl.float32), _half(dm >> 16) * ((pair >> 8) & 0xFF).to(tl.float32)
        elif FORMAT == "q2_k":
            pair, dm = first.to(tl.int32), _shared(planes[M + 1], row, unit // 8, inside, BLOCKS)
            pair = tl.join(pair, pair >> 8)
            return _again(_half(dm)) * (pair & 15).to(tl.float32), _again(_half(dm >> 16)) * ((pair >> 4) & 15).to(tl.float32)
        elif FORMAT == "q3_k":
            tops = _shared(planes[M + 1], row, unit // 8, inside, BLOCKS) >> (unit % 8 * 4)
            d = _shared(planes[M + 2], row, unit // 8, inside, BLOCKS).to(tl.float32)
            pair = first.to(tl.int32)
            scale = (tl.join(pair, pair >> 4) & 15) | ((tl.join(tops, tops >> 2) & 3) << 4)
            scale = _again(d) * (scale - 32).to(tl.float32)
            return scale, scale * CENTER
        elif FORMAT == "q6_k":
            d = _shared(planes[M + 1], row, unit // 8, inside, BLOCKS).to(tl.float32)
            pair = first.to(tl.int32)  # with its sign
            scale = _again(d) * tl.join((pair << 24) >> 24, pair >> 8).to(tl.float32)
            return scale, scale * CENTER
        elif CENTER == ZEROS:
            zero = _shared(planes[M + 1], row, unit * UNIT // GROUP, inside, COLUMNS // GROUP)
            return first.to(tl.float32), first.to(tl.float32) * zero.to(tl.float32)
        else:
            return first.to(tl.float32), first.to(tl.float32) * CENTER


@triton.jit
def _spread(values):
    """[R, U] or [R, U, 2] -> [R, U, 2, 2, 2, 2, 2]"""
    if len(values.shape) == 2:
        values = _again(values)
    return _again(_again(_again(_again(values))))


@triton.jit
def tile_values(
    planes, row, unit, inside, COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """Values float32 [R, 32 * U] of units `unit` int32 [1, U] of rows `row` int64 [R, 1], where `inside` [R, U]; else unspecified.

    planes: `as_words` of a part's; FORMAT to CENTER: `constants`.
    """
    codes = _codes(planes, row, unit, inside, COLUMNS, LOW, HIGH)
    scale, low = _scales(planes, row, unit, inside, COLUMNS, FORMAT, HIGH, GROUP, CENTER)
    if FORMAT == "fp8":
        values = _e4m3(codes) * _spread(scale)
    elif LOW == 8:
        values = ((codes << 24) >> 24).to(tl.float32) * _spread(scale)
    else:
        values = codes.to(tl.float32) * _spread(scale) - _spread(low)
    return tl.reshape(values, (row.shape[0], unit.shape[1] * UNIT))
