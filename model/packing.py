"""Stored tensors become parts of a weight: packed as they are stored, or quantized from 16 and 32 bits, on the device.

A stack of experts [experts, rows, columns] is packed as the matrix [experts * rows, columns].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from granite_kernels import formats
from granite_kernels.formats.base import ROWS
from granite_kernels.weight import DENSE, Part, Weight

from .checkpoint import Stored


def pack(stored: Stored, format: str | None, dtype: torch.dtype, device: torch.device) -> Part:
    """One tensor as a part on `device`: quantized to `format` where one is given, else in the format that it has.

    A dense tensor without a `format` stays dense, in `dtype`.
    """
    shape = (math.prod(stored.shape[:-1]), stored.shape[-1])
    dense = stored.data.is_floating_point() and not stored.metadata
    if format is not None:
        weight = stored.data if dense else values(stored, torch.float32)
        return Part(format, formats.get(format).quantize(weight.to(device).view(shape)), shape)
    if dense:
        return Part(DENSE, (stored.data.view(shape).to(device, dtype, copy=True),), shape)
    return Part(stored.format, planes(stored, device), shape)


def planes(stored: Stored, device: torch.device) -> tuple[Tensor, ...]:
    """The planes on `device` of a tensor that is stored packed."""
    rows, columns = math.prod(stored.shape[:-1]), stored.shape[-1]
    if stored.metadata:
        codes, *metadata = (part.to(device) for part in (stored.data, *stored.metadata))
        return formats.get_coded(stored.format).pack(codes.view(rows, columns), *metadata)
    return formats.get_gguf(stored.format).pack(stored.data.to(device).view(rows, -1), (rows, columns))


def values(stored: Stored, dtype: torch.dtype) -> Tensor:
    """The values in `dtype` [*shape] of a tensor that is stored packed, where it lies."""
    if not stored.metadata:
        return formats.get_gguf(stored.format).dequantize(stored.data, stored.shape, dtype)
    shape = (math.prod(stored.shape[:-1]), stored.shape[-1])
    return formats.get(stored.format).unpack(planes(stored, stored.data.device), shape, dtype).view(stored.shape)


def stack(parts: Sequence[Part]) -> Weight:
    """A weight of `parts`, neighbours of one format joined where their planes have no padding rows between them."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and _alike(last, part) and last.shape[0] % ROWS == 0:
            joined[-1] = _join((last, part), (last.shape[0] + part.shape[0], part.shape[1]), _below)
        else:
            joined.append(part)
    return Weight(*joined)


def stack_experts(parts: Sequence[Part], experts: int) -> Weight | None:
    """Parts [experts * rows_i, columns] joined along the rows of each expert; None where their planes don't allow it."""
    if len(parts) == 1:
        return Weight(parts[0])
    rows = [part.shape[0] // experts for part in parts]
    if any(not _alike(parts[0], part) for part in parts) or any(count % ROWS for count in rows):
        return None

    def join(planes: Sequence[Tensor]) -> Tensor:
        return torch.cat([plane.view(experts, -1, *plane.shape[1:]) for plane in planes], 1).flatten(0, 1)

    return Weight(_join(parts, (experts * sum(rows), parts[0].shape[1]), join))


def _below(planes: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(planes))


def _alike(one: Part, other: Part) -> bool:
    return one.format == other.format and [p.dtype for p in one.planes] == [p.dtype for p in other.planes]


def _join(parts: Sequence[Part], shape: tuple[int, int], join: Callable[[Sequence[Tensor]], Tensor]) -> Part:
    return Part(parts[0].format, tuple(join(planes) for planes in zip(*(part.planes for part in parts), strict=True)), shape)
