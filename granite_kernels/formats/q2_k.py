"""Q2_K: 256 weights in 84 bytes (2.625 bits); weight = (d * scale) * q - dmin * min, with a 4-bit scale and min for
each 16.

Block: scales [16] @0, byte i = scale | min << 4 of weights 16i .. 16i + 15; q [64] @16, weight e = bits 2 * (e % 128 //
32) of byte 32 * (e // 128) + e % 32; d float16 @80; dmin float16 @82.
Planes: q int32 [P, U, 2] (words.py); scales int16 [P/8, U, 8], the low byte for weights 0-15 of the unit, the high byte
for 16-31, each scale | min << 4; dm int32 [P/8, S, 8], d in the low half, dmin in the high half, S = columns / 256.
2.625 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values, halves
from granite_kernels.formats.words import UNIT, join, split


class Q2_K(GgufFormat):
    name = "q2_k"
    block, block_bytes = 256, 84
    code_bits = (2,)
    metadata = (Metadata(UNIT, torch.int16), Metadata(256, torch.int32))

    def _split(self, blocks: Tensor) -> Content:
        scales, q, dm = self._fields(blocks, 0, 16, 80)
        codes = split(q.unflatten(-1, (2, 32)), 2).flatten(1)
        return codes, [as_values(scales, torch.int16), as_values(dm, torch.int32)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        scales, dm = metadata
        q = join(codes.view(*dm.shape, 2, 4, 32), 2).flatten(2)
        return torch.cat((as_bytes(scales).view(*dm.shape, 16), q, as_bytes(dm)), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        scales, (d, dmin) = as_bytes(metadata[0]).view(*metadata[1].shape, 16), halves(metadata[1])
        scale = d[..., None] * (scales & 15).float()
        low = dmin[..., None] * (scales >> 4).float()
        out.copy_(codes)
        out.view(*scales.shape, 16).mul_(scale[..., None]).sub_(low[..., None])


FORMATS = {"q2_k": Q2_K()}
