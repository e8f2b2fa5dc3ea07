"""Q5_1: 32 weights in 24 bytes (6 bits); weight = d * q + m.

Block: d float16 @0; m float16 @2; 32 bits @4, bit e = bit 4 of q of weight e; 16 bytes @8, byte b = low nibbles of
weights b | 16 + b << 4.
Planes: low nibbles int32 [P, U, 4]; bit 4 int32 [P/8, U, 8] (words.py); dm int32 [P/8, U, 8], d in the low half, m in
the high half. 6 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values, halves
from granite_kernels.formats.words import UNIT, join, join_bits, split, split_bits


class Q5_1(GgufFormat):
    name = "q5_1"
    block, block_bytes = 32, 24
    code_bits = (4, 1)
    metadata = (Metadata(UNIT, torch.int32),)

    def _split(self, blocks: Tensor) -> Content:
        dm, high, q = self._fields(blocks, 0, 4, 8)
        codes = split(q, 4).flatten(1)
        codes |= split_bits(high).flatten(1).bitwise_left_shift_(4)
        return codes, [as_values(dm, torch.int32)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        (dm,) = metadata
        codes = codes.view(*dm.shape, 2, 16)
        return torch.cat((as_bytes(dm), join_bits(codes.bitwise_right_shift(4).flatten(2)), join(codes & 15, 4)), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        d, m = halves(metadata[0])
        out.copy_(codes)
        out.unflatten(1, (-1, UNIT)).mul_(d[..., None]).add_(m[..., None])


FORMATS = {"q5_1": Q5_1()}
