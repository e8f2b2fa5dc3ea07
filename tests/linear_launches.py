"""What the compile tests of the matrix kernels look at: launches of Granite 3.1 2B's matrices, never run."""

from __future__ import annotations

import torch
from torch import Tensor

from granite_kernels.formats import get
from granite_kernels.kernels import linear as kernels
from granite_kernels.weight import Part, Weight

HIDDEN, INNER = 2048, 8192


def weight(format: str, rows: int, columns: int) -> Weight:
    if format == "dense":
        return Weight.dense(torch.empty(rows, columns, dtype=torch.bfloat16))
    planes = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in get(format).layout((rows, columns)))
    return Weight(Part(format, planes, (rows, columns)))


def values(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def gate_up(format: str, tokens: int) -> None:
    kernels.norm_gate_up_swiglu(values(1, tokens, HIDDEN), values(HIDDEN), weight(format, 2 * INNER, HIDDEN), eps=1e-5)


def down(format: str, tokens: int) -> None:
    x, residual = values(1, tokens, INNER), values(1, tokens, HIDDEN)
    kernels.linear_add(x, weight(format, HIDDEN, INNER), residual, scale=0.22)
