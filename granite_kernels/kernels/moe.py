"""The router of a mixture of experts, fused with the norm before it: h = rms_norm(x), its experts and their shares.

    logits = h @ router.T;  the top_k largest, the lower index first where they tie;  shares = softmax over the chosen

A program has one token. It reads x twice (the second time from L1), writes h once, and reads the router, [experts, hidden], once:
128 KB in float32 for 32 experts of 1,024, most of it in flight at a time, from DRAM for the first token and from L2 for others.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.errors import GraniteError
from granite_kernels.launch import DTYPES, WIDEST_ROW, route_launch, target


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    tokens, hidden, experts = grid[0], args["hidden"], args["experts"]
    stream = args["x_ptr"].element_size() * hidden * (2 * tokens + 1)
    chosen = 8 * tokens * args["TOP_K"]
    router = args["router_ptr"].element_size() * experts * hidden
    return {"name": kernel.name, "flops": 2 * tokens * experts * hidden, "bytes": stream + router + chosen}


@triton.jit
def _best(logits, experts, TOP_K: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr):
    """(indices int32 [SLOTS], logits [SLOTS]) of the largest, in order; 0 and -inf behind the first TOP_K."""
    index = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # integers in the order of the floats, so that NaN has a place: the first
    key = tl.where(logits == logits, bits ^ ((bits >> 31) & 0x7FFFFFFF), 2147483647)
    key = tl.where(index < experts, key, -2147483648)
    chosen = tl.zeros((SLOTS,), tl.int32)
    values = tl.full((SLOTS,), float("-inf"), tl.float32)
    for place in tl.static_range(TOP_K):
        one = tl.min(tl.where(key == tl.max(key, 0), index, EXPERTS), 0)
        value = tl.sum(tl.where(index == one, logits, 0.0), 0)
        chosen = tl.where(slot == place, one, chosen)
        values = tl.where(slot == place, value, values)
        key = tl.where(index == one, -2147483648, key)
    return chosen, values


@triton.jit(launch_metadata=_cost)
def _norm_route_kernel(
    x_ptr,  # [tokens, hidden]
    norm_ptr,  # [hidden]
    router_ptr,  # [experts, hidden]
    h_ptr,  # [tokens, hidden]
    chosen_ptr,  # int32 [tokens, TOP_K]
    shares_ptr,  # float32 [tokens, TOP_K]
    hidden,
    experts,
    eps,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * hidden
    column = tl.arange(0, HIDDEN)
    row = tl.load(x_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row, 0) / hidden + eps)

    expert = tl.arange(0, EXPERTS)[:, None]
    logits = tl.zeros((EXPERTS,), tl.float32)
    for begin in range(0, hidden, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        router = tl.load(router_ptr + expert * hidden + k[None, :], mask=(expert < experts) & (k < hidden)[None, :], other=0.0)
        x = tl.load(x_ptr + k, mask=k < hidden, other=0.0)
        h = (x.to(tl.float32) * inverse).to(x.dtype) * tl.load(norm_ptr + k, mask=k < hidden, other=0.0)
        tl.store(h_ptr + token * hidden + k, h, mask=k < hidden)
        logits += tl.sum(router.to(tl.float32) * h.to(router.dtype).to(tl.float32)[None, :], 1)
    logits = logits.to(router_ptr.dtype.element_ty).to(tl.float32)  # as the model rounds them

    chosen, values = _best(logits, experts, TOP_K, SLOTS, EXPERTS)
    share = tl.exp(values - tl.max(values, 0))
    slot = tl.arange(0, SLOTS)
    tl.store(chosen_ptr + token * TOP_K + slot, chosen, mask=slot < TOP_K)
    tl.store(shares_ptr + token * TOP_K + slot, share / tl.sum(share, 0), mask=slot < TOP_K)


@torch.library.custom_op("granite_kernels::norm_route", mutates_args=())
def _norm_route(x: Tensor, norm: Tensor, router: Tensor, top_k: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    h, chosen, shares = _outputs(x, top_k)
    experts, hidden = router.shape
    shape = route_launch(experts, hidden)
    pdl = x.is_cuda and target(x).arch >= 90
    _norm_route_kernel[(x.numel() // hidden,)](
        x,
        norm,
        router,
        h,
        chosen,
        shares,
        hidden,
        experts,
        eps,
        TOP_K=top_k,
        SLOTS=triton.next_power_of_2(top_k),
        EXPERTS=shape.experts,
        HIDDEN=triton.next_power_of_2(hidden),
        BLOCK=shape.block,
        PDL=pdl,
        num_warps=shape.warps,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if pdl else {}),
    )
    return h, chosen, shares


def _outputs(x: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    places = (*x.shape[:-1], top_k)
    chosen = torch.empty(places, dtype=torch.int32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), chosen, torch.empty(places, dtype=torch.float32, device=x.device)


@_norm_route.register_fake
def _(x: Tensor, norm: Tensor, router: Tensor, top_k: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, top_k)


def norm_route(x: Tensor, norm: Tensor, router: Tensor, *, top_k: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed x and its experts: (h [batch, tokens, hidden], experts int32 [batch, tokens, top_k], weights float32 alike).

    router [experts, hidden], in a dtype of its own. Sums are float32; logits are rounded to the router's dtype, the top_k largest
    are chosen, the lower index first where they tie, and the softmax runs over the chosen ones. A NaN is chosen first. A token's
    bits do not depend on the others. Raises GraniteError.
    """
    experts, hidden = router.shape
    if x.shape[-1:] != (hidden,) or norm.shape != (hidden,) or not 1 <= top_k <= experts or hidden > WIDEST_ROW:
        raise GraniteError(f"x {tuple(x.shape)}, norm {tuple(norm.shape)}, router {tuple(router.shape)} and top {top_k} don't go together")
    if x.dtype not in DTYPES or router.dtype not in DTYPES or norm.dtype != x.dtype:
        raise GraniteError(
            f"x, norm and router are {x.dtype}, {norm.dtype}, {router.dtype}: expected float32, bfloat16 or float16, norm as x"
        )
    if not (x.is_contiguous() and norm.is_contiguous() and router.is_contiguous()):
        raise GraniteError("x, norm and router must be contiguous")
    h, chosen, shares = _norm_route(x, norm, router, top_k, eps)
    return h, chosen, shares
