"""Q4_0: 32 weights in 18 bytes (4.5 bits); weight = d * (q - 8).

Block: d float16 @0; 16 bytes @2, byte b = q of weight b | q of weight 16 + b << 4.
Planes: q int32 [P, U, 4] (words.py); d float16 [P/8, U, 8]. 4.5 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values
from granite_kernels.formats.words import UNIT, join, split


class Q4_0(GgufFormat):
    name = "q4_0"
    block, block_bytes = 32, 18
    code_bits = (4,)
    metadata = (Metadata(UNIT, torch.float16),)

    def _split(self, blocks: Tensor) -> Content:
        d, q = self._fields(blocks, 0, 2)
        return split(q, 4).flatten(1), [as_values(d, torch.float16)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        (d,) = metadata
        return torch.cat((as_bytes(d), join(codes.view(*d.shape, 2, 16), 4)), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        (d,) = metadata
        out.copy_(codes.view(torch.int8).sub_(8))
        out.unflatten(1, (-1, UNIT)).mul_(d.float()[..., None])


FORMATS = {"q4_0": Q4_0()}
