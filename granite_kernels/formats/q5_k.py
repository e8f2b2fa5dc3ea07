"""Q5_K: 256 weights in 176 bytes (5.5 bits); weight = (d * scale) * q - dmin * min, with a 6-bit scale and min for each
32.

Block: d float16 @0; dmin float16 @2; scales and mins [12] @4 (k_scales.py); high [32] @16, bit e // 32 of byte e % 32 =
bit 4 of q of weight e; low [128] @48, weight e = nibble e // 32 % 2 of byte 32 * (e // 64) + e % 32.
Planes: low nibbles int32 [P, U, 4]; bit 4 int32 [P/8, U, 8] (words.py); scales int16 [P/8, U, 8] = scale | min << 8; dm
int32 [P/8, S, 8], d in the low half, dmin in the high half, S = columns / 256. 5.625 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values
from granite_kernels.formats.k_scales import join_scales, scaled, split_scales
from granite_kernels.formats.words import UNIT, join, split


class Q5_K(GgufFormat):
    name = "q5_k"
    block, block_bytes = 256, 176
    code_bits = (4, 1)
    metadata = (Metadata(UNIT, torch.int16), Metadata(256, torch.int32))

    def _split(self, blocks: Tensor) -> Content:
        dm, scales, high, low = self._fields(blocks, 0, 4, 16, 48)
        codes = split(low.unflatten(-1, (4, 32)), 4).flatten(1)
        codes |= split(high, 1).flatten(1).bitwise_left_shift_(4)
        return codes, [split_scales(scales), as_values(dm, torch.int32)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        scales, dm = metadata
        codes = codes.view(*dm.shape, 4, 2, 32)
        high = join(codes.bitwise_right_shift(4).flatten(2, 3), 1)
        low = join(codes & 15, 4).flatten(2)
        return torch.cat((as_bytes(dm), join_scales(scales), high, low), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        scales, dm = metadata
        scaled(codes, scales, dm, out)


FORMATS = {"q5_k": Q5_K()}
