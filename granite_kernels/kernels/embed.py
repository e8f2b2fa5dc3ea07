"""Embedding rows times the embedding multiplier: a gather of [tokens, hidden] values, each read once, as stored, and written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.errors import GraniteError
from granite_kernels.kernels.rows import layout, row_values
from granite_kernels.launch import DTYPES, target
from granite_kernels.weight import DENSE, Weight

BLOCK = 1024


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    tokens, planes, values = grid[0], args["planes"], grid[0] * args["hidden"]
    row = sum(plane.numel() * plane.element_size() for plane in planes) / planes[0].shape[0]
    return {"name": kernel.name, "flops": values, "bytes": tokens * row + values * args["out_ptr"].element_size()}


@triton.jit(launch_metadata=_cost)
def _embed_kernel(
    ids_ptr,  # int64 [tokens]
    planes,  # of a weight [vocab, hidden]; dense: the matrix alone
    out_ptr,  # [tokens, hidden]
    hidden,
    multiplier,
    FORMAT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    row = row_values(planes, tl.load(ids_ptr + token), column, hidden, inside, FORMAT, LOW, HIGH, GROUP, CENTER)
    row = row.to(out_ptr.dtype.element_ty).to(tl.float32) * multiplier
    tl.store(out_ptr + token * hidden + column, row.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("granite_kernels::embed", mutates_args=())
def _embed(ids: Tensor, planes: Sequence[Tensor], format: str, hidden: int, multiplier: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty(*ids.shape, hidden, dtype=dtype, device=ids.device)
    pdl = ids.is_cuda and target(ids).arch >= 90
    _embed_kernel[(ids.numel(), triton.cdiv(hidden, BLOCK))](
        ids,
        tuple(plane.view(torch.uint8) if plane.dtype == torch.float8_e4m3fn else plane for plane in planes),
        out,
        hidden,
        multiplier,
        FORMAT=format,
        **layout(format),
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        enable_fp_fusion=False,  # so that a packed weight has the same values in every operation and on every backend
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


@_embed.register_fake
def _(ids: Tensor, planes: Sequence[Tensor], format: str, hidden: int, multiplier: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(*ids.shape, hidden, dtype=dtype, device=ids.device)


def embed(ids: Tensor, weight: Weight, *, multiplier: float, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [batch, tokens] of weight [vocab, hidden], times `multiplier`: [batch, tokens, hidden] in `dtype`.

    Ids are int64 and must lie within the vocabulary: whoever takes them from outside checks that. Packed rows, in one part of any
    format, are decoded as they are read. Raises GraniteError.
    """
    if len(weight.parts) != 1:
        raise GraniteError(f"an embedding of {len(weight.parts)} parts ({', '.join(weight.formats)}): expected one")
    (part,) = weight.parts
    if ids.dtype != torch.int64:
        raise GraniteError(f"ids are {ids.dtype}: expected int64")
    stored = part.planes[0].dtype if part.format == DENSE else torch.float32
    if stored not in DTYPES or dtype not in DTYPES:
        raise GraniteError(f"from {stored} to {dtype}: expected float32, bfloat16 or float16 for both")
    out: Tensor = _embed(ids.contiguous(), list(part.planes), part.format, weight.shape[1], multiplier, dtype)
    return out
