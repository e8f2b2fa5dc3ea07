"""Q6_K: 256 weights in 210 bytes (6.5625 bits); weight = (d * scale) * (q - 32), with a signed 8-bit scale for each 16.

Block, for weight e with h = e // 128 and r = e % 128: low [128] @0, nibble r // 64 of byte 64h + r % 64; high [64]
@128, bits 2 * (r // 32) of byte 32h + r % 32 = bits 4-5 of q; scales int8 [16] @192; d float16 @208.
Planes: low nibbles int32 [P, U, 4]; bits 4-5 int32 [P, U, 2] (words.py); scales int16 [P/8, U, 8], two int8, the low
byte for weights 0-15 of the unit, the high byte for 16-31; d float16 [P/8, S, 8], S = columns / 256. 6.5625 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata, interleave
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values
from granite_kernels.formats.search import TINY, extreme, inverse, symmetric
from granite_kernels.formats.words import UNIT, join, nibble_words, pair_words, split

CANDIDATES = [-32.0, *(-(32 + 0.1 * i) for i in range(-9, 10) if i)]


class Q6_K(GgufFormat):
    name = "q6_k"
    block, block_bytes = 256, 210
    code_bits = (4, 2)
    metadata = (Metadata(UNIT, torch.int16), Metadata(256, torch.float16))

    def _pieces(self, blocks: Tensor) -> tuple[Tensor, ...]:
        low, high, scales, d = self._fields(blocks, 0, 128, 192, 208)
        words = nibble_words(low.unflatten(-1, (2, 64))).view(blocks.shape[0], -1, 4)
        pairs = pair_words(high.unflatten(-1, (2, 32))).view(blocks.shape[0], -1, 2)
        return words, pairs, interleave(as_values(scales, torch.int16)), interleave(as_values(d, torch.float16))

    def _split(self, blocks: Tensor) -> Content:
        low, high, scales, d = self._fields(blocks, 0, 128, 192, 208)
        codes = split(low.unflatten(-1, (2, 64)), 4).flatten(1)
        codes |= split(high.unflatten(-1, (2, 32)), 2).flatten(1).bitwise_left_shift_(4)
        return codes, [as_values(scales, torch.int16), as_values(d, torch.float16)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        scales, d = metadata
        codes = codes.view(*d.shape, 2, 128)
        low = join((codes & 15).unflatten(-1, (2, 64)), 4).flatten(2)
        high = join(codes.bitwise_right_shift(4).unflatten(-1, (4, 32)), 2).flatten(2)
        return torch.cat((low, high, as_bytes(scales).view(*d.shape, 16), as_bytes(d)), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        scales, d = metadata
        scale = d.float()[..., None] * as_bytes(scales).view(torch.int8).view(*d.shape, 16).float()
        out.copy_(codes.view(torch.int8).sub_(32))
        out.view(*scale.shape, 16).mul_(scale[..., None])

    def _encode(self, weight: Tensor) -> Content:
        """llama.cpp's search: `symmetric` for each 16, weighted by x^2; scales to 8 bits, the extreme one -128."""
        x = weight.view(weight.shape[0], -1, 16, 16)
        scale = symmetric(x, 32, CANDIDATES, x.square())[..., 0]
        top = extreme(scale)
        unit = torch.where(top.abs() < TINY, 0.0, -128 * inverse(top))
        d = inverse(unit).half()
        scale8 = (scale * unit).round_().clamp_(max=127)
        step = (d.float() * scale8)[..., None]
        codes = (x * inverse(step)).round_().clamp_(-32, 31).add_(32)
        return codes.to(torch.uint8).flatten(1), [scale8.to(torch.int8).view(torch.int16).flatten(1), d.flatten(1)]


FORMATS = {"q6_k": Q6_K()}
