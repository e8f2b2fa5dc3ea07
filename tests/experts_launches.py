"""The launches of a layer's experts at the models' sizes, to be compiled by the laboratory: nothing is read or computed."""

from __future__ import annotations

from typing import Any

import torch
import triton

from granite_kernels.formats import get
from granite_kernels.kernels.moe import experts_down_add, experts_gate_up_swiglu
from granite_kernels.launch import DecodeLaunch, GroupedLaunch, MatrixLaunch
from granite_kernels.linear import experts_operations, rows
from granite_kernels.weight import DENSE, Part, Weight

SIZES = {"3.1-1b-a400m": (1024, 512, 32), "3.1-3b-a800m": (1536, 512, 40)}  # hidden, inner, experts
TOP_K = 8


def weight(rows: int, columns: int, format: str, dtype: torch.dtype) -> Weight:
    if format == DENSE:
        return Weight.dense(torch.empty(rows, columns, dtype=dtype))
    planes = tuple(torch.empty(shape, dtype=kind) for shape, kind in get(format).layout((rows, columns)))
    return Weight(Part(format, planes, (rows, columns)))


def streamed(preset: str, tokens: int, bits: float = 16) -> dict[str, int]:
    """The weights' bytes of each launch of a step where tokens choose as many experts as they can."""
    hidden, inner, experts = SIZES[preset]
    one = int(min(tokens * TOP_K, experts) * hidden * inner * bits / 8)
    return {"_experts_gate_up_swiglu_kernel": 2 * one, "_experts_down_add_kernel": one}


def layer(preset: str, tokens: int, gate_up: str = DENSE, down: str = DENSE, kind: str = "bfloat16") -> None:
    """Both operations for `tokens` tokens with the weights in these formats."""
    hidden, inner, experts = SIZES[preset]
    dtype: torch.dtype = getattr(torch, kind)
    stream, chosen = torch.empty(1, tokens, hidden, dtype=dtype), torch.empty(1, tokens, TOP_K, dtype=torch.int32)
    experts_gate_up_swiglu(stream, weight(experts * 2 * inner, hidden, gate_up, dtype), chosen, experts=experts)
    products = torch.empty(1, tokens, TOP_K, inner, dtype=dtype)
    experts_down_add(products, weight(experts * hidden, inner, down, dtype), chosen, torch.empty(1, tokens, TOP_K), stream, scale=0.22)


def large_tiles(monkeypatch: Any) -> None:
    """Few programs with tiles that no GPU would take: a program costs the interpreter some ten milliseconds, whatever its size."""

    def step(columns: int, tokens: int, format: str) -> MatrixLaunch:
        steps = triton.next_power_of_2(-(-columns // 32))  # all at once
        return MatrixLaunch(groups=32 if columns >= 256 else 8, warps=steps, splits=1, tokens=8 if tokens <= 8 else 16)

    monkeypatch.setattr(experts_operations, "experts_launch", step)
    monkeypatch.setattr(experts_operations, "grouped_launch", lambda choices, experts, dtype: GroupedLaunch(32, 256, 128, 4, 1))
    monkeypatch.setattr(rows, "decode_launch", lambda gather: DecodeLaunch(1 if gather else 1024, 16, 4))
