"""Attention and experts as transformers' own tables of implementations take them, for models that ask by name.

Where a gradient may be asked for, a mask is no left padding, or experts are of another make, transformers' own functions run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .engine import expert_matrix
from .layer import PACKED, attend, why_not_experts
from .session import Session
from .status import NAME

EXPERTS_ELSE = "grouped_mm"  # transformers' default
OTHER_EXPERTS = ("has_bias", "is_transposed", "has_post_expert_norm")


def register() -> None:
    """Enter our functions; `status` knows the name, too."""
    AttentionInterface.register(NAME, Attention())
    AttentionMaskInterface.register(NAME, sdpa_mask)
    ExpertsInterface.register(NAME, Experts())


def _traced(*tensors: Tensor) -> bool:
    """Whether stock code has to run: a gradient may be asked for, or a compiler reads along."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


class Attention:
    """What transformers calls for a layer's attention."""

    def __init__(self) -> None:
        self.session = Session("auto")

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """query [batch, heads, tokens, head_dim], key and value [batch, kv_heads, context, head_dim]: [batch, tokens, heads, head_dim]."""
        batch, _, tokens, head_dim = query.shape
        held = key.shape[2] - 1 if tokens == 1 else 0  # without a mask transformers' sdpa reads it so, too
        strange = dropout > 0 or any(others.get(name) is not None for name in (*PACKED, "cache", "position_bias", "softcap", "s_aux"))
        window = None if strange or _traced(query, key, value) else self.session.window(attention_mask, held, batch, tokens, query.device)
        if window is None or not getattr(module, "is_causal", True) or head_dim < 16 or head_dim & (head_dim - 1):
            options = dict(scaling=scaling, dropout=dropout, **others)
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        scale = head_dim**-0.5 if scaling is None else scaling
        kit = self.session.kit(query)
        return attend(kit, query.transpose(1, 2).contiguous(), key, value, window, scale), None


class Experts:
    """What transformers calls for a layer's experts."""

    def __init__(self) -> None:
        self.session = Session("auto")

    def __call__(self, module: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """hidden [tokens, hidden], chosen and shares [tokens, top_k]: [tokens, hidden]."""
        other = any(getattr(module, name, False) for name in OTHER_EXPERTS) or not (module.has_gate and module.is_concatenated)
        if other or why_not_experts(module) is not None or _traced(hidden, shares, module.gate_up_proj):
            return ExpertsInterface()[EXPERTS_ELSE](module, hidden, chosen, shares)
        ops, slots = self.session.kit(hidden).ops, chosen.to(torch.int32)[None]
        inner = ops.experts_gate_up_swiglu(hidden[None], expert_matrix(module.gate_up_proj), slots, experts=module.num_experts)
        zero = torch.zeros_like(hidden)[None]
        return ops.experts_down_add(inner, expert_matrix(module.down_proj), slots, shares.float()[None], zero, scale=1.0)[0]
