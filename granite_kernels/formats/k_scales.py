"""What Q4_K and Q5_K share: 6-bit scales and mins for eight units of 32 weights, and the value of a weight.

In a block, 12 bytes s: for unit j < 4 scale = s[j] & 63 and min = s[j+4] & 63; for j >= 4 scale = s[j+4] & 15 | s[j-4]
>> 6 << 4 and min = s[j+4] >> 4 | s[j] >> 6 << 4. In a plane, 16 bits a unit: scale | min << 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from granite_kernels.formats.gguf import as_bytes, halves
from granite_kernels.formats.words import UNIT, swap


def split_scales(packed: Tensor) -> Tensor:
    """s uint8 [rows, blocks, 12] -> int16 [rows, blocks * 8] of scale | min << 8."""
    scales, mins, both = (words.contiguous() for words in packed.view(torch.int32).unbind(-1))  # four units in the bytes of a word
    units = torch.empty(*both.shape, 2, 2, dtype=torch.int32, device=packed.device)  # halves of four units, scales and mins
    for kind, words, at in ((0, scales, 0), (1, mins, 4)):
        units[..., 0, kind] = words & 0x3F3F3F3F
        units[..., 1, kind] = (both >> at).bitwise_and_(0x0F0F0F0F).bitwise_or_((words >> 2).bitwise_and_(0x30303030))
    pairs = units.view(torch.int64)  # from bytes s s s s m m m m
    swap(pairs, 16, 0x00000000FFFF0000)  # to s s m m s s m m
    swap(pairs, 8, 0x0000FF000000FF00)
    return units.view(torch.int16).flatten(1)


def join_scales(planes: Tensor) -> Tensor:
    """The inverse of `split_scales`."""
    pairs = as_bytes(planes).view(planes.shape[0], -1, 8, 2).transpose(-1, -2).contiguous()
    low, high = pairs.view(torch.int32).unbind(-1)  # [rows, blocks, 2] each: scales, mins
    first = low | (high & 0x30303030) << 2
    both = high[..., 0] & 0x0F0F0F0F | (high[..., 1] & 0x0F0F0F0F) << 4
    return torch.cat((first, both[..., None]), -1).view(torch.uint8)


def scaled(codes: Tensor, scales: Tensor, dm: Tensor, out: Tensor) -> None:
    """out = (d * scale) * code - dmin * min, each product rounded to float32."""
    d, dmin = halves(dm)
    pairs = as_bytes(scales).view(*dm.shape, 8, 2).float()
    scale = d[..., None] * pairs[..., 0]
    low = dmin[..., None] * pairs[..., 1]
    out.copy_(codes)
    out.view(*scale.shape, UNIT).mul_(scale[..., None]).sub_(low[..., None])
