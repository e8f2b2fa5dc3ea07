"""int8, a scale per row (compressed-tensors "channel"): weight = scale * q, q in -127 .. 127 when quantized here.

Planes: q int8 [P, columns], natural order; scale float32 [P/8, 1, 8]. 8 bits and 4 bytes a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import ROW, Content, Metadata
from granite_kernels.formats.coded import CodedFormat
from granite_kernels.formats.search import inverse


class Int8(CodedFormat):
    name = "int8"
    block = 32
    code_bits = (8,)
    metadata = (Metadata(ROW, torch.float32),)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        out.copy_(codes.view(torch.int8))
        out.mul_(metadata[0])

    def _encode(self, weight: Tensor) -> Content:
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight * inverse(scale)).round_().clamp_(-127, 127).to(torch.int8)
        return codes.view(torch.uint8), [scale]


FORMATS = {"int8": Int8()}
