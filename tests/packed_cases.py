"""Packed weights for tests: every bit pattern that a format's codes can take, and metadata such that weights are about one."""

from __future__ import annotations

import torch
from torch import Tensor

from granite_kernels import formats
from granite_kernels.linear import rows
from granite_kernels.weight import Part, Weight

HALVES = {"q4_1", "q5_1", "q2_k", "q4_k", "q5_k"}  # whose int32 metadata is a pair of float16


def random_part(format: str, shape: tuple[int, int], seed: int = 0) -> Part:
    """A part with random planes; padding rows are as random as the others, since nobody may look at them."""
    generator = torch.Generator().manual_seed(seed)
    found = formats.get(format)

    def integers(size: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    def plane(size: tuple[int, ...], dtype: torch.dtype, code: bool) -> Tensor:
        if dtype == torch.float8_e4m3fn:
            return torch.randn(size, generator=generator).to(dtype)
        if dtype.is_floating_point:
            return (torch.randn(size, generator=generator) * 2.0 ** -sum(found.code_bits)).to(dtype)
        if dtype == torch.int32 and format in HALVES and not code:
            return (torch.randn(*size, 2, generator=generator) / 64).half().view(torch.int32)[..., 0]
        if dtype == torch.int16 and format in ("q4_k", "q5_k"):
            return (integers(size, 0, 64) | integers(size, 0, 64) << 8).to(dtype)
        if format.endswith("_zero") and not code:
            return integers(size, 0, 17).to(dtype)
        return integers((*size, dtype.itemsize), 0, 256).to(torch.uint8).view(dtype)[..., 0]

    layout = found.layout(shape)
    planes = tuple(plane(size, dtype, index < len(found.code_bits)) for index, (size, dtype) in enumerate(layout))
    return Part(format, planes, shape)


def random_weight(*parts: tuple[str, int], columns: int) -> Weight:
    """A weight of parts (format, rows)."""
    return Weight(*(random_part(format, (count, columns), seed) for seed, (format, count) in enumerate(parts)))


def decode(formats_: list[str]) -> None:
    """What the compile tests look at: a gather of two rows of an embedding and the whole of a matrix, in each format."""
    for format in formats_:
        planes = tuple(torch.empty(size, dtype=dtype) for size, dtype in formats.get(format).layout((4096, 2048)))
        part = Part(format, planes, (4096, 2048))
        rows.gather(torch.empty(2, dtype=torch.int64), part, multiplier=12.0, dtype=torch.bfloat16)
        rows.unpack(part, torch.bfloat16)
