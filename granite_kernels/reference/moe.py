"""A mixture of experts: the router, the chosen experts' gate|up and SwiGLU, their down products combined into the stream.

Experts are an index into one weight: expert e owns rows e * 2 inner .. of `gate_up` (gate rows first) and e * hidden .. of `down`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.reference.norm import rms_norm
from granite_kernels.reference.swiglu import swiglu
from granite_kernels.weight import Weight, dense_matrix


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
    inner = gate_up.shape[0] // experts // 2
    out = h.new_empty(*chosen.shape, inner)
    flat, rows = h.flatten(0, -2), out.flatten(0, 1)
    for expert, token, slot in _by_expert(chosen):
        rows[token, slot] = swiglu(F.linear(flat[token], _rows(gate_up, expert, 2 * inner, h.dtype)))
    return out


def experts_down_add(inner: Tensor, down: Weight, chosen: Tensor, shares: Tensor, residual: Tensor, *, scale: float) -> Tensor:
    """residual + scale * sum over a token's experts, in the order they were chosen, of shares * (inner @ down.T).

    inner [batch, tokens, top_k, inner]; down [experts * hidden, inner]; chosen int32 and shares float32 [batch, tokens, top_k];
    residual [batch, tokens, hidden].
    """
    hidden = residual.shape[-1]
    products = residual.new_empty(*chosen.shape, hidden)
    rows, flat = products.flatten(0, 1), inner.flatten(0, 1)
    for expert, token, slot in _by_expert(chosen):
        rows[token, slot] = F.linear(flat[token, slot], _rows(down, expert, hidden, inner.dtype))
    weighted = products * shares.to(products.dtype)[..., None]
    return residual + weighted.sum(dim=2) * scale


def _by_expert(chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For every expert that a token chose: (expert, the tokens' indices, the places among their choices)."""
    top_k = chosen.shape[-1]
    flat = chosen.flatten().long()
    order = flat.argsort(stable=True)
    ids, counts = flat.unique(return_counts=True)
    for expert, places in zip(ids.tolist(), order.split(counts.tolist()), strict=True):
        yield expert, places // top_k, places % top_k


def _rows(weight: Weight, expert: int, rows: int, dtype: torch.dtype) -> Tensor:
    (part,) = weight.parts
    return dense_matrix(part, dtype)[expert * rows : (expert + 1) * rows]
