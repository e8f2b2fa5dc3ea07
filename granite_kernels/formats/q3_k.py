"""Q3_K: 256 weights in 110 bytes (3.4375 bits); weight = (d * (scale - 32)) * (q - 4), with a 6-bit scale for each 16.

Block: high [32] @0, bit e // 32 of byte e % 32 = bit 2 of q of weight e; low [64] @32, bits 2 * (e % 128 // 32) of byte
32 * (e // 128) + e % 32; scales [12] @96, scale i of weights 16i .. 16i + 15: bits 0-3 are nibble i // 8 of byte i % 8,
bits 4-5 are bits 2 * (i // 4) of byte 8 + i % 4; d float16 @108.
Planes (S = columns / 256): bits 0-1 of q int32 [P, U, 2]; bit 2 int32 [P/8, U, 8] (words.py); bits 0-3 of the scales
uint8 [P/8, U, 8], the low nibble for weights 0-15 of the unit, the high nibble for 16-31; bits 4-5 int32 [P/8, S, 8],
of scale i at bit 2i; d float16 [P/8, S, 8]. 3.4375 bits: scales of 8 bits would be 3.6 % more than the file holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values
from granite_kernels.formats.words import UNIT, join, split


class Q3_K(GgufFormat):
    name = "q3_k"
    block, block_bytes = 256, 110
    code_bits = (2, 1)
    metadata = (Metadata(UNIT, torch.uint8), Metadata(256, torch.int32), Metadata(256, torch.float16))

    def _split(self, blocks: Tensor) -> Content:
        high, low, nibbles, tops, d = self._fields(blocks, 0, 32, 96, 104, 108)
        codes = split(low.unflatten(-1, (2, 32)), 2).flatten(1)
        codes |= split(high, 1).flatten(1).bitwise_left_shift_(2)
        pairs = split(nibbles, 4).flatten(2)  # by scale
        scales = (pairs[..., 0::2] | pairs[..., 1::2] << 4).flatten(1)
        fours = split(tops, 2)  # [.., i // 4, i % 4]
        bytes_of_four = fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6
        return codes, [scales, as_values(bytes_of_four, torch.int32), as_values(d, torch.float16)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        scales, tops, d = metadata
        codes = codes.view(*d.shape, 256)
        high = join(codes.bitwise_right_shift(2).unflatten(-1, (8, 32)), 1)
        low = join((codes & 3).unflatten(-1, (2, 4, 32)), 2).flatten(2)
        pairs = torch.stack((scales & 15, scales >> 4), -1).view(*d.shape, 2, 8)
        fours = torch.stack([(as_bytes(tops) >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
        return torch.cat((high, low, join(pairs, 4), join(fours, 2), as_bytes(d)), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        scales, tops, d = metadata
        low = torch.stack((scales & 15, scales >> 4), -1).view(*d.shape, 16)
        high = torch.stack([(as_bytes(tops) >> shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(2)
        scale = d.float()[..., None] * (low | high << 4).view(torch.int8).sub(32).float()
        out.copy_(codes.view(torch.int8).sub_(4))
        out.view(*scale.shape, 16).mul_(scale[..., None])


FORMATS = {"q3_k": Q3_K()}
