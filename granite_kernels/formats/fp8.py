"""FP8 e4m3 with a scale per row (one per tensor is the same scale for each row): weight = scale * q.

Planes: q float8_e4m3fn [P, columns], natural order; scale float32 [P/8, 1, 8]. 8 bits and 4 bytes a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.formats.base import ROW, Content, Metadata
from granite_kernels.formats.coded import CodedFormat
from granite_kernels.formats.search import inverse

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8(CodedFormat):
    name = "fp8"
    block = 32
    code_bits = (8,)
    code_dtype = torch.float8_e4m3fn
    metadata = (Metadata(ROW, torch.float32),)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        out.copy_(codes.view(torch.float8_e4m3fn))
        out.mul_(metadata[0])

    def _encode(self, weight: Tensor) -> Content:
        scale = weight.abs().amax(1, keepdim=True) / LARGEST
        codes = (weight * inverse(scale)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), [scale]


FORMATS = {"fp8": Fp8()}
