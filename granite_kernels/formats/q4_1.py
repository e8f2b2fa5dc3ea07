"""Q4_1: 32 weights in 20 bytes (5 bits); weight = d * q + m.

Block: d float16 @0; m float16 @2; 16 bytes @4, byte b = q of weight b | q of weight 16 + b << 4.
Planes: q int32 [P, U, 4] (words.py); dm int32 [P/8, U, 8], d in the low half, m in the high half. 5 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values, halves
from granite_kernels.formats.words import UNIT, join, split


class Q4_1(GgufFormat):
    name = "q4_1"
    block, block_bytes = 32, 20
    code_bits = (4,)
    metadata = (Metadata(UNIT, torch.int32),)

    def _split(self, blocks: Tensor) -> Content:
        dm, q = self._fields(blocks, 0, 4)
        return split(q, 4).flatten(1), [as_values(dm, torch.int32)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        (dm,) = metadata
        return torch.cat((as_bytes(dm), join(codes.view(*dm.shape, 2, 16), 4)), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        d, m = halves(metadata[0])
        out.copy_(codes)
        out.unflatten(1, (-1, UNIT)).mul_(d[..., None]).add_(m[..., None])


FORMATS = {"q4_1": Q4_1()}
