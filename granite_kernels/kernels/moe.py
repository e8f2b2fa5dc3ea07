"""A mixture of experts: the router, fused with the norm before it, and the chosen experts.

Experts are an index into one weight: expert e owns rows e * 2 inner .. of `gate_up` (gate rows first) and e * hidden .. of `down`.
One to sixteen tokens take one launch for gate|up and one for down (granite_kernels/linear/experts.py), more a grouped product over
choices sorted by expert (grouped.py); which experts were chosen stays on the device. The router is here:

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
from granite_kernels.linear import experts_operations
from granite_kernels.linear.experts_operations import workspace_size
from granite_kernels.linear.regimes import is_skinny
from granite_kernels.linear.rows import unpack
from granite_kernels.operation import operation
from granite_kernels.weight import DENSE, Weight, dense_matrix
from granite_kernels.workspace import Workspace


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


@operation("granite_kernels::norm_route", mutates_args=())
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


# ------------------------------------------------------------------ the experts


def _check(x: Tensor, weight: Weight, chosen: Tensor, experts: int) -> None:
    rows, columns = weight.shape
    if rows % experts or x.shape[-1] != columns:
        raise GraniteError(f"x {tuple(x.shape)} and a weight [{rows}, {columns}] of {experts} experts don't go together")
    if x.dtype not in DTYPES:
        raise GraniteError(f"x is {x.dtype}: expected float32, bfloat16 or float16")
    if chosen.dtype != torch.int32 or not chosen.is_contiguous():
        raise GraniteError(f"chosen is {chosen.dtype}: expected contiguous int32 [batch, tokens, top_k]")


def _takes_a_step(stream: Tensor, weight: Weight, rows: int) -> bool:
    """Whether the kernels of a step serve it: packed, an expert begins with a whole eight of rows, and so does its second half."""
    return is_skinny(stream, weight) and len(weight.parts) == 1 and (weight.parts[0].format == DENSE or rows % 16 == 0)


def _matrix(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as one dense matrix with contiguous rows, packed ones decoded for this call.

    All experts are: 17 tokens that choose 8 of 32 leave hardly one out. In Q4_K it makes a layer of 1B move 230 MB in place of 29,
    over 24 layers 1.6 ms of an H100's bandwidth, as long as the experts' products of 2,700 tokens take at its peak.
    """
    parts = [dense_matrix(part, dtype) if part.format == DENSE else unpack(part, dtype) for part in weight.parts]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def experts_gate_up_swiglu(h: Tensor, gate_up: Weight, chosen: Tensor, *, experts: int) -> Tensor:
    """silu(gate) * up of each token's chosen experts.

    h [batch, tokens, hidden]; gate_up [experts * 2 * inner, hidden]; chosen int32 [batch, tokens, top_k], below `experts` and
    different for a token. Returns [batch, tokens, top_k, inner]. A token's bits depend on the number of tokens in the call alone, in
    classes: 1, 2 to 8, 9 to 16, and by the shape of the grouped product beyond. Raises GraniteError.
    """
    _check(h, gate_up, chosen, experts)
    rows = gate_up.shape[0] // experts
    if rows % 2 or chosen.shape[:-1] != h.shape[:-1]:
        raise GraniteError(f"h {tuple(h.shape)}, chosen {tuple(chosen.shape)} and {rows} rows an expert don't go together")
    if chosen.numel() == 0:
        return h.new_empty(*chosen.shape, rows // 2)
    h = h.contiguous()
    if _takes_a_step(h, gate_up, rows):
        (part,) = gate_up.parts
        return experts_operations.experts_gate_up_swiglu(h, list(part.planes), part.format, experts, rows, chosen)
    order, starts = experts_operations.sort_choices(chosen, experts)
    return experts_operations.grouped_gate_up_swiglu(h, _matrix(gate_up, h.dtype), chosen, order, starts)


def experts_down_add(
    inner: Tensor, down: Weight, chosen: Tensor, shares: Tensor, residual: Tensor, *, scale: float, workspace: Workspace | None = None
) -> Tensor:
    """residual + scale * sum over a token's experts, in the order they were chosen, of shares * (inner @ down.T).

    inner [batch, tokens, top_k, inner]; down [experts * hidden, inner]; chosen int32 and shares float32 [batch, tokens, top_k];
    residual [batch, tokens, hidden]. Bits as those of experts_gate_up_swiglu. Raises GraniteError.
    """
    rows = residual.shape[-1]
    experts = max(down.shape[0] // rows, 1)
    _check(inner, down, chosen, experts)
    if down.shape[0] % rows or not inner.shape[:-1] == chosen.shape == shares.shape or residual.shape[:-1] != chosen.shape[:-1]:
        raise GraniteError(
            f"inner {tuple(inner.shape)}, chosen {tuple(chosen.shape)}, shares {tuple(shares.shape)} and residual {tuple(residual.shape)} "
            f"don't go together with a weight {list(down.shape)}"
        )
    if shares.dtype != torch.float32 or residual.dtype != inner.dtype:
        raise GraniteError(f"shares are {shares.dtype}, residual {residual.dtype}: expected float32 and {inner.dtype}, as inner")
    if chosen.numel() == 0:
        return residual.clone()
    inner, shares, residual = inner.contiguous(), shares.contiguous(), residual.contiguous()
    if _takes_a_step(residual, down, rows):
        (part,) = down.parts
        need = workspace_size(chosen.numel() // chosen.shape[-1], chosen.shape[-1], rows, inner.shape[-1], part.format)
        if workspace is None:
            workspace = Workspace.allocate(*need, inner.device)
        workspace.need(*need)
        return experts_operations.experts_down_add(
            inner, list(part.planes), part.format, experts, rows, chosen, shares, residual, workspace.tickets, workspace.partials, scale
        )
    order, starts = experts_operations.sort_choices(chosen, experts)
    return experts_operations.grouped_down_add(inner, _matrix(down, inner.dtype), order, starts, shares, residual, scale)


__all__ = ["experts_down_add", "experts_gate_up_swiglu", "norm_route", "workspace_size"]
