"""The forward pass of Granite 3.1, dense and mixture of experts, on one screen.

    x = embed(ids) * embedding_multiplier
    per layer   q, cache = rope(norm(x) @ qkv);   x = x + attention(q, cache) @ o * residual_multiplier
                x = x + (silu(gate) * up)(norm(x)) @ down * residual_multiplier       dense, or the chosen experts' combined
    logits = norm(x) @ head / logits_scaling

The same function prefills, decodes eagerly and is what the CUDA graph captures.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from granite_kernels.launch import DECODE_TOKENS
from granite_kernels.ops import Ops
from granite_kernels.weight import Weight

from .cache import Cache
from .config import GraniteConfig


class Experts(nn.Module):
    """The experts of a layer: router [experts, hidden]; gate_up and down stack the experts' rows; a shared expert if there is one."""

    def __init__(self, router: Tensor, gate_up: Weight, down: Weight, shared_gate_up: Weight | None, shared_down: Weight | None) -> None:
        super().__init__()
        self.router = nn.Parameter(router, requires_grad=False)
        self.gate_up, self.down = gate_up, down
        self.shared_gate_up, self.shared_down = shared_gate_up, shared_down


class Layer(nn.Module):
    """The weights of one layer: norms [hidden]; qkv rows q | k | v; gate_up rows gate | up; either a dense MLP or experts."""

    def __init__(
        self,
        input_norm: Tensor,
        qkv: Weight,
        o: Weight,
        post_norm: Tensor,
        gate_up: Weight | None = None,
        down: Weight | None = None,
        experts: Experts | None = None,
    ) -> None:
        super().__init__()
        self.input_norm = nn.Parameter(input_norm, requires_grad=False)
        self.post_norm = nn.Parameter(post_norm, requires_grad=False)
        self.qkv, self.o, self.gate_up, self.down, self.experts = qkv, o, gate_up, down, experts


class Weights(nn.Module):
    """All weights of a model. A tied head is the same Weight as the embedding."""

    def __init__(self, embed: Weight, layers: list[Layer], norm: Tensor, head: Weight) -> None:
        super().__init__()
        self.embed, self.head = embed, head
        self.stack = nn.ModuleList(layers)
        self.layers = layers
        self.norm = nn.Parameter(norm, requires_grad=False)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a forward pass reads beside the weights: ids int64 and positions int32 [batch, tokens], rotary [positions, head_dim]."""

    ids: Tensor
    positions: Tensor
    rotary: Tensor


def forward(config: GraniteConfig, weights: Weights, inputs: Inputs, cache: Cache, ops: Ops) -> Tensor:
    """Run the layers over inputs.ids, writing their keys and values behind cache.lengths; the caller advances the cache.

    Returns the residual stream [batch, tokens, hidden] before the last norm.
    """
    eps, scale = config.rms_norm_eps, config.residual_multiplier
    attend = ops.attention_decode if inputs.ids.numel() <= DECODE_TOKENS else ops.attention
    x = ops.embed(inputs.ids, weights.embed, multiplier=config.embedding_multiplier, dtype=weights.norm.dtype)
    for index, layer in enumerate(weights.layers):
        k, v = cache.layer(index)
        q = ops.norm_qkv_rope_append(x, layer.input_norm, layer.qkv, inputs.rotary, inputs.positions, cache.lengths, k, v, eps=eps)
        attended = attend(q, k, v, cache.lengths, cache.starts, scale=config.attention_multiplier)
        x = ops.linear_add(attended.flatten(2), layer.o, x, scale=scale)
        if layer.experts is None:
            inner = ops.norm_gate_up_swiglu(x, layer.post_norm, layer.gate_up, eps=eps)
            x = ops.linear_add(inner, layer.down, x, scale=scale)
        else:
            x = _experts(config, layer, x, ops)
    return x


def _experts(config: GraniteConfig, layer: Layer, x: Tensor, ops: Ops) -> Tensor:
    experts, eps, scale = layer.experts, config.rms_norm_eps, config.residual_multiplier
    assert experts is not None
    h, chosen, shares = ops.norm_route(x, layer.post_norm, experts.router, top_k=config.num_experts_per_tok, eps=eps)
    inner = ops.experts_gate_up_swiglu(h, experts.gate_up, chosen, experts=config.num_local_experts)
    if experts.shared_gate_up is not None:
        shared = ops.norm_gate_up_swiglu(x, layer.post_norm, experts.shared_gate_up, eps=eps)
        x = ops.linear_add(shared, experts.shared_down, x, scale=scale)
    return ops.experts_down_add(inner, experts.down, chosen, shares, x, scale=scale)


def logits(config: GraniteConfig, weights: Weights, x: Tensor, ops: Ops) -> Tensor:
    """Logits [batch, tokens, vocab] of the residual stream x."""
    return ops.norm_logits(x, weights.norm, weights.head, eps=config.rms_norm_eps, scaling=config.logits_scaling)
