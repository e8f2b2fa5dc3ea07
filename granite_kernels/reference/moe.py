"""A mixture of experts: the router, the chosen experts' gate|up and SwiGLU, their down products combined into the stream.

Experts are an index into one weight: expert e owns rows e * 2 inner .. of `gate_up` (gate rows first) and e * hidden .. of `down`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.reference.linear import HALVES, product, slow_in_16_bits
from granite_kernels.reference.norm import rms_norm
from granite_kernels.weight import Weight, dense_rows


def norm_route(x: Tensor, norm: Tensor, router: Tensor, *, top_k: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed x and its experts: (h [batch, tokens, hidden], experts int32 [batch, tokens, top_k], weights float32 alike).

    router [experts, hidden]. Logits are float32; the top_k largest are chosen, the lower index first where they tie, and the
    softmax runs over the chosen ones.
    """
    h = rms_norm(x, norm, eps=eps)
    logits = F.linear(h.to(router.dtype), router)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    return h, order[..., :top_k].int(), values[..., :top_k].softmax(-1)


def experts_gate_up_swiglu(h: Tensor, gate_up: Weight, chosen: Tensor, *, experts: int) -> Tensor:
    """silu(gate) * up of each token's chosen experts.

    h [batch, tokens, hidden]; gate_up [experts * 2 * inner, hidden]; chosen int32 [batch, tokens, top_k].
    Returns [batch, tokens, top_k, inner].
    """
    order = chosen.flatten().argsort(stable=True)
    x = h.flatten(0, -2).index_select(0, order // chosen.shape[-1])
    gate, up = _grouped(x, gate_up, chosen, gate_up.shape[0] // experts).chunk(2, dim=-1)
    inner = F.silu(gate, inplace=True).mul_(up)  # as swiglu, in memory that is there already
    return inner.index_select(0, order.argsort()).view(*chosen.shape, inner.shape[-1])


def experts_down_add(inner: Tensor, down: Weight, chosen: Tensor, shares: Tensor, residual: Tensor, *, scale: float) -> Tensor:
    """residual + scale * sum over a token's experts, in the order they were chosen, of shares * (inner @ down.T).

    inner [batch, tokens, top_k, inner]; down [experts * hidden, inner]; chosen int32 and shares float32 [batch, tokens, top_k];
    residual [batch, tokens, hidden].
    """
    order = chosen.flatten().argsort(stable=True)
    products = _grouped(inner.flatten(0, 2).index_select(0, order), down, chosen, residual.shape[-1])
    places, shares = order.argsort().view(-1, chosen.shape[-1]), shares.to(products.dtype).flatten(0, 1)
    if products.dtype in HALVES:  # a model in 16 bits rounds each product with its share
        combined = products[places].mul_(shares[..., None]).sum(dim=1)
    else:
        combined = F.embedding_bag(places, products, per_sample_weights=shares, mode="sum")  # in one pass
    return residual + combined.view_as(residual) * scale


def _grouped(x: Tensor, weight: Weight, chosen: Tensor, rows: int) -> Tensor:
    """Each x [choices, columns], sorted by expert, times its expert's `rows` rows: [choices, rows]."""
    (part,) = weight.parts
    ids, counts = (found.tolist() for found in chosen.unique(return_counts=True))
    out = x.new_empty(x.shape[0], rows)
    for expert, group, place in zip(ids, x.split(counts), out.split(counts), strict=True):
        own = dense_rows(part, expert * rows, rows, x.dtype)
        if slow_in_16_bits(group):
            place.copy_(product(group, own))
        else:
            torch.mm(group, own.T, out=place)
    return out
