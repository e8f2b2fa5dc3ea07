"""Our engine over the weights of a transformers model: their very memory, q, k, v and gate, up as parts that lie apart.

Whatever changes their parameters in place changes ours. A parameter that is replaced, by `model.to(dtype)` say, comes apart from
the engine, which keeps what it was made of; so does an adapter that is added later. Make the engine anew after either.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.weight import Weight

from ..config import GraniteConfig
from ..granite import Experts, Layer, Weights
from .models import causal_lm, moe_of, shared_of, why_not_shared


def from_transformers(model: Any) -> tuple[GraniteConfig, Weights]:
    """Configuration and weights of a supported model; nothing is copied. Raises GraniteError, naming the module in the way."""
    lm = causal_lm(model)
    raw = lm.config.to_dict() | {"dtype": str(lm.dtype).removeprefix("torch.")}
    if lm.generation_config is not None and lm.generation_config.eos_token_id is not None:
        raw["eos_token_id"] = lm.generation_config.eos_token_id  # what their generate stops at
    config = GraniteConfig.from_dict(raw, source=f"the configuration of this {type(lm).__name__}")
    reason = why_not_shared(lm)
    if reason is not None:
        raise GraniteError(reason)
    base = lm.model
    embed = Weight.dense(base.embed_tokens.weight.detach())
    tied = lm.lm_head.weight.data_ptr() == base.embed_tokens.weight.data_ptr()
    layers = [_layer(layer) for layer in base.layers]
    return config, Weights(embed, layers, base.norm.weight.detach(), embed if tied else _dense(lm.lm_head))


def _dense(*linears: Any) -> Weight:
    return Weight.dense(*(linear.weight.detach() for linear in linears))


def _layer(layer: Any) -> Layer:
    attention = layer.self_attn
    parts: dict[str, Any] = dict(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=_dense(attention.q_proj, attention.k_proj, attention.v_proj),
        o=_dense(attention.o_proj),
        post_norm=layer.post_attention_layernorm.weight.detach(),
    )
    moe = moe_of(layer)
    if moe is None:
        return Layer(**parts, gate_up=_dense(layer.mlp.gate_proj, layer.mlp.up_proj), down=_dense(layer.mlp.down_proj))
    return Layer(**parts, experts=_experts(moe, shared_of(layer)))


def expert_matrix(stack: Tensor) -> Weight:
    """[experts, rows, columns] as one matrix [experts * rows, columns], without a copy."""
    return Weight.dense(stack.detach().view(-1, stack.shape[-1]))


def _experts(moe: Any, shared: Any) -> Experts:
    return Experts(
        moe.router.weight.detach(),
        expert_matrix(moe.experts.gate_up_proj),
        expert_matrix(moe.experts.down_proj),
        _dense(shared.input_linear) if shared is not None else None,
        _dense(shared.output_linear) if shared is not None else None,
    )
