"""What the compile tests of the matrix kernels look at: decode launches of Granite 3.1 2B's matrices, never run."""

from __future__ import annotations

import torch
from torch import Tensor

from granite_kernels.formats import get
from granite_kernels.kernels import linear as kernels
from granite_kernels.weight import Part, Weight

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 2048, 8192, 32, 8, 64


def weight(format: str, rows: int, columns: int) -> Weight:
    planes = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in get(format).layout((rows, columns)))
    return Weight(Part(format, planes, (rows, columns)))


def values(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def qkv(format: str, tokens: int) -> None:
    cache, places = values(1, KV_HEADS, 16, HEAD_DIM), torch.empty(1, tokens, dtype=torch.int32)
    packed = weight(format, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
    rotary, lengths = values(1024, HEAD_DIM), torch.empty(1, dtype=torch.int32)
    kernels.norm_qkv_rope_append(values(1, tokens, HIDDEN), values(HIDDEN), packed, rotary, places, lengths, cache, cache, eps=1e-5)


def o(format: str, tokens: int) -> None:
    kernels.linear_add(values(1, tokens, HIDDEN), weight(format, HIDDEN, HIDDEN), values(1, tokens, HIDDEN), scale=0.22)


def gate_up(format: str, tokens: int) -> None:
    kernels.norm_gate_up_swiglu(values(1, tokens, HIDDEN), values(HIDDEN), weight(format, 2 * INNER, HIDDEN), eps=1e-5)


def down(format: str, tokens: int) -> None:
    kernels.linear_add(values(1, tokens, INNER), weight(format, HIDDEN, INNER), values(1, tokens, HIDDEN), scale=0.22)


LAUNCHES = {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}


def steps(cases: list[tuple[str, str, int]]) -> None:
    """Launches (operation, format, tokens)."""
    for operation, format, tokens in cases:
        LAUNCHES[operation](format, tokens)
