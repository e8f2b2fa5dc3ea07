"""Q5_0: 32 weights in 22 bytes (5.5 bits); weight = d * (q - 16).

Block: d float16 @0; 32 bits @2, bit e = bit 4 of q of weight e; 16 bytes @6, byte b = low nibbles of weights b | 16 + b
<< 4.
Planes: low nibbles int32 [P, U, 4]; bit 4 int32 [P/8, U, 8] (words.py); d float16 [P/8, U, 8]. 5.5 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values
from granite_kernels.formats.search import extreme, inverse
from granite_kernels.formats.words import UNIT, join, join_bits, split, split_bits


class Q5_0(GgufFormat):
    name = "q5_0"
    block, block_bytes = 32, 22
    code_bits = (4, 1)
    metadata = (Metadata(UNIT, torch.float16),)

    def _split(self, blocks: Tensor) -> Content:
        d, high, q = self._fields(blocks, 0, 2, 6)
        codes = split(q, 4).flatten(1)
        codes |= split_bits(high).flatten(1).bitwise_left_shift_(4)
        return codes, [as_values(d, torch.float16)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        (d,) = metadata
        codes = codes.view(*d.shape, 2, 16)
        return torch.cat((as_bytes(d), join_bits(codes.bitwise_right_shift(4).flatten(2)), join(codes & 15, 4)), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        (d,) = metadata
        out.copy_(codes.view(torch.int8).sub_(16))
        out.unflatten(1, (-1, UNIT)).mul_(d.float()[..., None])

    def _encode(self, weight: Tensor) -> Content:
        """The extreme weight of a unit becomes -16. Equal to gguf-py's bit for bit."""
        x = weight.unflatten(1, (-1, UNIT))
        d = extreme(x) / -16
        codes = (x * inverse(d)).add_(16.5).trunc_().clamp_(0, 31)
        return codes.to(torch.uint8).flatten(1), [d[..., 0].half()]


FORMATS = {"q5_0": Q5_0()}
