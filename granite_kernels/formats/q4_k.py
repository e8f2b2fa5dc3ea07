"""Q4_K: 256 weights in 144 bytes (4.5 bits); weight = (d * scale) * q - dmin * min, with a 6-bit scale and min for each
32.

Block: d float16 @0; dmin float16 @2; scales and mins [12] @4 (k_scales.py); q [128] @16, weight e = nibble e // 32 % 2
of byte 32 * (e // 64) + e % 32.
Planes: q int32 [P, U, 4] (words.py); scales int16 [P/8, U, 8] = scale | min << 8; dm int32 [P/8, S, 8], d in the low
half, dmin in the high half, S = columns / 256. 4.625 bits: scales on byte boundaries cost 2.8 % and save their
decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import Content, Metadata, interleave
from granite_kernels.formats.gguf import GgufFormat, as_bytes, as_values
from granite_kernels.formats.k_scales import join_scales, scaled, split_scales
from granite_kernels.formats.search import affine, inverse
from granite_kernels.formats.words import UNIT, join, nibble_words, split

STEPS = [-1.0 + 0.1 * i for i in range(21)]


class Q4_K(GgufFormat):
    name = "q4_k"
    block, block_bytes = 256, 144
    code_bits = (4,)
    metadata = (Metadata(UNIT, torch.int16), Metadata(256, torch.int32))

    def _pieces(self, blocks: Tensor) -> tuple[Tensor, ...]:
        dm, scales, q = self._fields(blocks, 0, 4, 16)
        words = nibble_words(q.unflatten(-1, (4, 32))).view(blocks.shape[0], -1, 4)
        return words, interleave(split_scales(scales)), interleave(as_values(dm, torch.int32))

    def _split(self, blocks: Tensor) -> Content:
        dm, scales, q = self._fields(blocks, 0, 4, 16)
        codes = split(q.unflatten(-1, (4, 32)), 4).flatten(1)
        return codes, [split_scales(scales), as_values(dm, torch.int32)]

    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        scales, dm = metadata
        q = join(codes.view(*dm.shape, 4, 2, 32), 4).flatten(2)
        return torch.cat((as_bytes(dm), join_scales(scales), q), -1)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        scales, dm = metadata
        scaled(codes, scales, dm, out)

    def _encode(self, weight: Tensor) -> Content:
        """llama.cpp's search: `affine` for each unit, weighted by its RMS + |x|; both results to 6 bits."""
        x = weight.view(weight.shape[0], -1, 8, UNIT)
        weights = x.abs() + x.square().mean(-1, keepdim=True).sqrt_()
        scale, low = affine(x, 15, STEPS, weights)
        scale6, d = _six_bits(scale)
        low6, dmin = _six_bits(low)
        step, offset = d.float() * scale6, dmin.float() * low6
        codes = (x + offset).mul_(inverse(step)).round_().clamp_(0, 15)
        planes = torch.cat((scale6, low6), -1).to(torch.uint8).view(torch.int16)
        dm = torch.cat((d, dmin), -1).view(torch.int32)
        return codes.to(torch.uint8).flatten(1), [planes.flatten(1), dm.flatten(1)]


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """values >= 0 [..., 8, 1] -> integers 0 .. 63 of the same shape, and their unit float16 [..., 1, 1]."""
    top = values.amax(-2, keepdim=True)
    return (values * (63 * inverse(top))).round_().clamp_(0, 63), (top / 63).half()


FORMATS = {"q4_k": Q4_K()}
