"""Embedding rows times the embedding multiplier: a gather of [tokens, hidden] values, each read once, as stored, and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.errors import GraniteError
from granite_kernels.launch import DTYPES, target
from granite_kernels.linear import rows
from granite_kernels.operation import operation
from granite_kernels.weight import DENSE, Weight

BLOCK = 1024


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    values = grid[0] * args["hidden"]
    return {"name": kernel.name, "flops": values, "bytes": values * (args["weight_ptr"].element_size() + args["out_ptr"].element_size())}


@triton.jit(do_not_specialize_on_alignment=["ids_ptr"], launch_metadata=_cost)
def _embed_kernel(
    ids_ptr,  # int64 [tokens], from any place of a prompt on
    weight_ptr,  # [vocab, hidden]
    out_ptr,  # [tokens, hidden]
    hidden,
    multiplier,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    row = tl.load(weight_ptr + tl.load(ids_ptr + token) * hidden + column, mask=inside, other=0.0)
    row = row.to(out_ptr.dtype.element_ty).to(tl.float32) * multiplier
    tl.store(out_ptr + token * hidden + column, row.to(out_ptr.dtype.element_ty), mask=inside)


@operation("granite_kernels::embed", mutates_args=())
def _embed(ids: Tensor, weight: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
    hidden = weight.shape[1]
    out = torch.empty(*ids.shape, hidden, dtype=dtype, device=weight.device)
    pdl = weight.is_cuda and target(weight).arch >= 90
    _embed_kernel[(ids.numel(), triton.cdiv(hidden, BLOCK))](
        ids,
        weight,
        out,
        hidden,
        multiplier,
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


@_embed.register_fake
def _(ids: Tensor, weight: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(*ids.shape, weight.shape[1], dtype=dtype, device=weight.device)


def embed(ids: Tensor, weight: Weight, *, multiplier: float, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [batch, tokens] of weight [vocab, hidden], times `multiplier`: [batch, tokens, hidden] in `dtype`.

    Ids are int64 and must lie within the vocabulary: whoever takes them from outside checks that. Packed rows are decoded as they
    are gathered. Raises GraniteError.
    """
    if len(weight.parts) != 1:
        raise GraniteError(f"an embedding of {len(weight.parts)} parts ({', '.join(weight.formats)}): expected one")
    (part,) = weight.parts
    if ids.dtype != torch.int64:
        raise GraniteError(f"ids are {ids.dtype}: expected int64")
    stored = part.planes[0].dtype if part.format == DENSE else torch.float32
    if stored not in DTYPES or dtype not in DTYPES:
        raise GraniteError(f"from {stored} to {dtype}: expected float32, bfloat16 or float16 for both")
    if part.format != DENSE:
        return rows.gather(ids, part, multiplier=multiplier, dtype=dtype)
    out: Tensor = _embed(ids.contiguous(), part.planes[0], multiplier, dtype)
    return out
