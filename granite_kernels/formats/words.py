"""Bit fields of weights inside 32-bit words, in the one order that every format below 8 bits uses.

A unit is 32 consecutive weights of a row; element 8t + i of it, i = 4*i2 + 2*i1 + i0. Fields of 4, 2 or 1 bits fill 4,
2 or 1 words a unit. With n = 4 / bits, the field of element 8t + i stands

    in word t // n,  at bit  16*i0 + 8*i2 + bits*(2*(t % n) + i1)

Why: masking a word with the field's bits in each byte gives four bytes that are elements 8t + (0, 4, 1, 5) for i1 = 0
and 8t + (2, 6, 3, 7) for i1 = 1, ready for an integer dot product (activations permuted alike); masking two fields 16
bits apart gives the neighbours 8t + 2j and 8t + 2j + 1, which one instruction makes a pair of 16-bit floats. Low and
high fields of one element agree in i0 and i2, so joining them is one shift and one merge for a whole word.

Shifts are spelled out: on the CPU `>>` and `<<` of tensors take a slower path than the functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 32


def gather(codes: Tensor, shift: int, bits: int) -> Tensor:
    """Bits shift .. shift + bits - 1 of codes uint8 [rows, columns] as words int32 [rows, columns / 32, bits]."""
    rows, columns = codes.shape
    mask = 0x01010101 * ((1 << bits) - 1)  # four elements, i1 and i0 counting bytes
    fields = codes.view(torch.int32)
    fields = fields.bitwise_right_shift(shift).bitwise_and_(mask) if shift else fields & mask
    fields |= fields.bitwise_right_shift(16 - bits)
    fields &= 0x0101 * ((1 << 2 * bits) - 1)  # bytes i0, each with the pair i1
    fields |= fields.bitwise_left_shift(8)
    fields &= 0x00FF00FF  # bytes 2 * i0
    fields = fields.view(rows, columns // 8, 2)
    eights = fields[..., 1].bitwise_left_shift(8)
    eights |= fields[..., 0]  # bytes 2 * i0 + i2
    count = 4 // bits
    eights = eights.view(rows, columns // UNIT, bits, count)
    words = eights[..., 0].contiguous() if count > 1 else eights[..., 0]
    for index in range(1, count):
        words |= eights[..., index].bitwise_left_shift(2 * bits * index)
    return words


def spread(words: Tensor, bits: int) -> Tensor:
    """The inverse of `gather`: words int32 [rows, units, bits] to fields uint8 [rows, 32 * units]."""
    rows, units, _ = words.shape
    count = 4 // bits
    if count > 1:
        mask = 0x01010101 * ((1 << 2 * bits) - 1)
        words = torch.stack([words.bitwise_right_shift(2 * bits * i).bitwise_and_(mask) for i in range(count)], -1)
    words = words.reshape(rows, units * 4)
    fields = torch.empty(rows, units * 4, 2, dtype=torch.int32, device=words.device)
    for half in range(2):
        pairs = words.bitwise_right_shift(8 * half).bitwise_and_(0x00FF00FF)
        pairs |= pairs.bitwise_right_shift(8)
        pairs &= 0xFFFF
        pairs |= pairs.bitwise_left_shift(16 - bits)
        torch.bitwise_and(pairs, 0x01010101 * ((1 << bits) - 1), out=fields[..., half])
    return fields.view(torch.uint8).view(rows, units * UNIT)


def nibble_words(packed: Tensor) -> Tensor:
    """Bytes uint8 [..., n] whose low nibbles are a run of n codes and whose high nibbles are the next -> both runs' words, int32
    [..., 2, n / 8]. As `gather` of `split`, but codes never take a byte each; n a multiple of 32, packed contiguous (overwritten).
    """
    words = packed.view(torch.int32)
    swap(words, 8, 0x0000FF00)  # bytes 2 * i0 + i1
    swap(words, 4, 0x00F000F0)  # bytes 2 * i0 + run, each with the pair i1
    first, second = _deal(words)  # i2
    _exchange(first, second, 8, 0x00FF00FF)
    fours = [run.view(torch.complex128) for run in (first, second)]  # 16 bytes an element: torch moves elements one by one
    return torch.stack(fours, -2).view(torch.int32)


def pair_words(packed: Tensor) -> Tensor:
    """Bytes uint8 [..., n] of four codes of 2 bits, each of them of a run of n -> the runs' words, int32 [..., 4, n / 16]; as
    `nibble_words`, n a multiple of 32.
    """
    words = packed.view(torch.int32)
    swap(words, 8, 0x0000FF00)  # bytes 2 * i0 + i1
    swap(words, 4, 0x00F000F0)  # bytes 2 * i0 + run // 2, each of nibbles i1
    swap(words, 2, 0x0C0C0C0C)  # nibbles 4 * i0 + run, each with the pair i1
    even, odd = _deal(words)  # i2
    rows = [*_deal(even), *_deal(odd)]  # t % 2; they are to be nibbles 0 to 3 of each half of a word
    for one, other, bits, mask in ((0, 1, 4, 0x0F0F0F0F), (2, 3, 4, 0x0F0F0F0F), (0, 2, 8, 0x00FF00FF), (1, 3, 8, 0x00FF00FF)):
        _exchange(rows[one], rows[other], bits, mask)
    return torch.stack([row.view(torch.int64) for row in rows], -2).view(torch.int32)


def _deal(words: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [..., 2 * n] -> the words at even and at odd places, [..., n] each. Casts are vectorized, strides aren't."""
    pairs = words.view(torch.int64)
    return pairs.to(torch.int32), pairs.bitwise_right_shift(32).to(torch.int32)


def swap(words: Tensor, bits: int, mask: int) -> None:
    """Exchange the bits of `mask` with those `bits` places above them, in place."""
    moved = words.bitwise_right_shift(bits).bitwise_xor_(words).bitwise_and_(mask)
    words ^= moved.mul_(1 + (1 << bits))  # both places in one product: they don't overlap


def _exchange(one: Tensor, other: Tensor, bits: int, mask: int) -> None:
    """Exchange the bits of `mask` in `other` with those `bits` places above them in `one`, in place."""
    moved = one.bitwise_right_shift(bits).bitwise_xor_(other).bitwise_and_(mask)
    other ^= moved
    one ^= moved.bitwise_left_shift_(bits)


def split(packed: Tensor, bits: int) -> Tensor:
    """Bytes uint8 [..., n] of 8 / bits values each -> [..., 8 / bits, n], lowest bits first; n a multiple of 4."""
    words, mask = packed.contiguous().view(torch.int32), 0x01010101 * ((1 << bits) - 1)
    fields = torch.stack([words.bitwise_right_shift(shift).bitwise_and_(mask) for shift in range(0, 8, bits)], -2)
    return fields.view(torch.uint8)


def join(fields: Tensor, bits: int) -> Tensor:
    """The inverse of `split`: uint8 [..., 8 / bits, n] -> [..., n]."""
    packed = fields[..., 0, :].clone()
    for index in range(1, 8 // bits):
        packed |= fields[..., index, :].bitwise_left_shift(bits * index)
    return packed


def split_bits(packed: Tensor) -> Tensor:
    """Bytes uint8 [..., n] -> their bits as bytes 0 or 1 [..., 8 * n], bit 0 first."""
    spots = packed.to(torch.int64)[..., None] * 0x0101010101010101
    spots &= 0x8040201008040201 - (1 << 64)  # byte i keeps bit i
    return (spots.view(torch.uint8) != 0).view(torch.uint8).flatten(-2)


def join_bits(bits: Tensor) -> Tensor:
    """The inverse of `split_bits`: bytes 0 or 1 [..., 8 * n] -> uint8 [..., n]."""
    moved = bits.contiguous().view(torch.int64) * 0x0102040810204080  # brings byte i to bit 56 + i, with no carry
    return ((moved >> 56) & 0xFF).to(torch.uint8)
