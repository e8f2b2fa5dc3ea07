"""int4 in groups of 32, 64 or 128 columns (compressed-tensors, GPTQ): weight = scale * (q - zero), q and zero unsigned.

int4_g<group>: symmetric, zero = 8. int4_g<group>_zero: a zero point for each group.
Planes: q int32 [P, U, 4] (words.py); scale float16 or bfloat16 [P/8, columns / group, 8]; with zero points, zero uint8
[P/8, columns / group, 8]. Bits at 32 / 64 / 128: 4.5 / 4.25 / 4.125, with zero points 4.75 / 4.375 / 4.1875 (of 4.625 /
4.3125 / 4.15625 stored: zero points of 4 bits take a byte, as GPTQ's reach 16).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.formats.base import Content, Metadata
from granite_kernels.formats.coded import CodedFormat
from granite_kernels.formats.search import inverse, polished, symmetric

CANDIDATES = [sign * (6.5 + 0.5 * i) for sign in (-1, 1) for i in range(6)]  # either sign may have the code -8
FACTORS = [1.0, 0.96, 0.98, 1.02, 1.04]  # around the best of them


class Int4(CodedFormat):
    code_bits = (4,)

    def __init__(self, group: int, *, zero: bool) -> None:
        self.name = f"int4_g{group}_zero" if zero else f"int4_g{group}"
        self.block = self.group = group
        self.zero = zero
        scale = Metadata(group, torch.float16)
        self.metadata = (scale, Metadata(group, torch.uint8)) if zero else (scale,)

    def pack(self, codes: Tensor, *metadata: Tensor) -> tuple[Tensor, ...]:
        """Planes of codes uint8 [rows, columns] (0 .. 15), 16-bit scale [rows, columns / group], zero uint8 alike."""
        if metadata and metadata[0].dtype not in (torch.float16, torch.bfloat16):
            raise GraniteError(f"{self.name}: 16-bit scales are needed, found {metadata[0].dtype}; round them first")
        return super().pack(codes, *metadata)

    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        grouped = out.unflatten(1, (-1, self.group))
        grouped.copy_(codes.unflatten(1, (-1, self.group)))
        grouped.sub_(metadata[1].float()[..., None] if self.zero else 8.0).mul_(metadata[0].float()[..., None])

    def _encode(self, weight: Tensor) -> Content:
        """The scale of least squared error among CANDIDATES and, around the best one, FACTORS; each solved for its codes."""
        if self.zero:
            return super()._encode(weight)
        x = weight.unflatten(1, (-1, self.group))
        scale = polished(x, symmetric(x, 8, CANDIDATES), 8, FACTORS).half()
        q = (x * inverse(scale.float())).round_().clamp_(-8, 7)
        return (q + 8).to(torch.uint8).flatten(1), [scale[..., 0]]


FORMATS = {f.name: f for f in (Int4(group, zero=zero) for group in (32, 64, 128) for zero in (False, True))}
