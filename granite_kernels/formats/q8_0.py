"""Q8_0: 32 weights in 34 bytes (8.5 bits); weight = d * q, q signed.

Block: d float16 @0; q int8 [32] @2.
Planes: q int8 [P, columns], natural order; d float16 [P/8, U, 8]. 8.5 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values
from granite_kernels.formats.search import inverse
from granite_kernels.formats.words import UNIT


class Q8_0(GgufFormat):
    name = "q8_0"
    block, block_bytes = 32, 34
    code_bits = (8,)
    metadata = (Metadata(UNIT, torch.float16),)

    def _split(self, blocks: Tensor) -> Content:
        d, q = self._fields(blocks, 0, 2)
        return q.flatten(1), [as_values(d, torch.float16)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        (d,) = metadata
        return torch.cat((as_bytes(d), codes.unflatten(1, (-1, UNIT))), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        (d,) = metadata
        out.copy_(codes.view(torch.int8))
        out.unflatten(1, (-1, UNIT)).mul_(d.float()[..., None])

    def _encode(self, weight: Tensor) -> Content:
        """The largest weight of a unit becomes 127; halves round away from zero. Equal to gguf-py's bit for bit."""
        x = weight.unflatten(1, (-1, UNIT))
        d = x.abs().amax(-1, keepdim=True) / 127
        scaled = x * inverse(d)
        whole = scaled.trunc()
        codes = whole + (2 * (scaled - whole)).trunc_()
        return codes.to(torch.int8).view(torch.uint8).flatten(1), [d[..., 0].half()]


FORMATS = {"q8_0": Q8_0()}
