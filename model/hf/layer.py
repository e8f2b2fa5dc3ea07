"""The forwards that `accelerate` puts into the instances of a model: a decoder layer's, a norm's and the head's.

A layer is five launches and the cache's update where all of its parts are what the class made; a part that another library has
replaced, wrapped or hooked is called as it stands, and what lies around it still runs on kernels. The look at each part happens
on each call, so that an adapter which is added later counts at once. Stock code runs where a gradient may be asked for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from granite_kernels.launch import DECODE_TOKENS
from granite_kernels.weight import Weight

from .engine import expert_matrix
from .models import CACHE, activation_is_silu, moe_of, shared_of, why_not, why_not_linear
from .session import Kit, Session
from .window import Window

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # several sequences in one row


class Forward:
    """Stands as `forward` in the __dict__ of one module."""

    is_ours = True

    def __init__(self, module: nn.Module, session: Session) -> None:
        self.module, self.session = module, session
        self.before = module.__dict__.get("forward")  # at most the class's own, bound: what unpickling leaves behind
        self._weights: dict[str, tuple[list[int], Weight]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """A copy of the model is accelerated by itself, over its own weights."""
        made = type(self)(copy.deepcopy(self.module, memo), copy.deepcopy(self.session, memo))
        made.before = copy.deepcopy(self.before, memo)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """What is unpickled is the class's own forward: a stock model, which needs no package of ours."""
        return getattr, (self.module, "forward")

    def stock(self, *arguments: Any, **keywords: Any) -> Any:
        return type(self.module).forward(self.module, *arguments, **keywords)

    def runs(self, x: Tensor) -> bool:
        """Whether kernels may run on x: no gradient can be asked for, nothing is traced or cast behind our back."""
        if self.module.training or not self.session.active or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        return not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in self.module.parameters()))

    def weight(self, name: str, *matrices: Tensor) -> Weight:
        """The matrices as one weight, without a copy; kept until one of them is another tensor."""
        key = [matrix.data_ptr() for matrix in matrices]
        kept = self._weights.get(name)
        if kept is None or kept[0] != key or kept[1].parts[0].planes[0].dtype != matrices[0].dtype:
            flat = (matrix.detach() for matrix in matrices)
            made = expert_matrix(matrices[0]) if matrices[0].dim() == 3 else Weight.dense(*flat)
            kept = self._weights[name] = (key, made)
        return kept[1]

    def linears(self, name: str, *modules: Any) -> Weight | None:
        """The projections as one weight; None where one of them has to be called."""
        for module in modules:
            if why_not_linear(module) is not None:
                return None
        return self.weight(name, *[module._parameters["weight"] for module in modules])


class NormForward(Forward):
    def __call__(self, hidden_states: Tensor) -> Tensor:
        norm: Any = self.module
        if hidden_states.dtype != norm.weight.dtype or not self.runs(hidden_states):
            return self.stock(hidden_states)
        return self.session.kit(hidden_states).rms_norm(hidden_states, norm.weight, eps=norm.variance_epsilon)


class HeadForward(Forward):
    def __call__(self, input: Tensor) -> Tensor:
        head: Any = self.module
        weight = self.linears("head", head) if input.dtype == head.weight.dtype and self.runs(input) else None
        return self.stock(input) if weight is None else self.session.kit(input).linear(input, weight)


class LayerForward(Forward):
    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        cache: Any = None,
        **others: Any,
    ) -> Tensor:
        """As the stock layer: hidden_states [batch, tokens, hidden] to the same."""
        layer: Any = self.module
        paged = cache is not None and not isinstance(cache, Cache)  # the pages of continuous batching
        past = past_key_values if cache is None else cache
        passed = dict(
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **{"cache" if paged else CACHE: past},
            **others,
        )
        if hidden_states.dtype != layer.input_layernorm.weight.dtype or not self.runs(hidden_states):
            return self.stock(hidden_states, **passed)
        if paged or any(others.get(name) is not None for name in PACKED):
            self.session.note("a row that packs several sequences (continuous batching, training) needs transformers' attention")
            return self.stock(hidden_states, **passed)
        kit, scale = self.session.kit(hidden_states), float(getattr(layer, "residual_multiplier", 1.0))
        x = self._attention(hidden_states, kit, scale, passed)
        return self._mlp(x, kit, scale) if moe_of(layer) is None else self._experts(x, kit, scale)

    # ------------------------------------------------------------------ attention

    def _attention(self, x: Tensor, kit: Kit, scale: float, passed: dict[str, Any]) -> Tensor:
        layer: Any = self.module
        attention, past = layer.self_attn, passed[CACHE]
        (batch, tokens, _), mask = x.shape, passed["attention_mask"]
        held = 0 if past is None else past.get_seq_length(attention.layer_idx)
        window = self.session.window(mask, held, batch, tokens, x.device)
        if window is None:
            self.session.note("an attention mask that isn't left padding needs transformers' attention")
        if window is None or why_not(attention) is not None:
            branch, _ = attention(hidden_states=self._normed(layer.input_layernorm, x, kit), **passed)
            return x + branch * scale
        q, k, v = self._qkv(x, kit, passed["position_embeddings"])
        if past is not None:
            k, v = past.update(k, v, attention.layer_idx)
        attended = attend(kit, q, k, v, window, attention.scaling).flatten(2)
        out = self.linears("o", attention.o_proj)
        if out is None:
            return x + attention.o_proj(attended) * scale
        return kit.ops.linear_add(attended, out, x, scale=scale)

    def _qkv(self, x: Tensor, kit: Kit, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [batch, tokens, heads, head_dim]; rotated k and v [batch, kv_heads, tokens, head_dim], as a cache takes them."""
        layer: Any = self.module
        attention, norm = layer.self_attn, layer.input_layernorm
        batch, tokens, _ = x.shape
        table, positions, empty = self.session.rotary(embeddings, batch)
        kv_heads = attention.config.num_key_value_heads
        k, v = (x.new_empty(batch, kv_heads, tokens, attention.head_dim) for _ in range(2))
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight = self.linears("qkv", *parts) if why_not(norm) is None else None
        if weight is not None:
            eps = norm.variance_epsilon
            return kit.ops.norm_qkv_rope_append(x, norm.weight, weight, table, positions, empty, k, v, eps=eps), k, v
        h = self._normed(norm, x, kit)
        heads = [part(h).unflatten(-1, (-1, attention.head_dim)) for part in parts]
        return kit.rope_append(*heads, table, positions, empty, k, v), k, v

    def _normed(self, norm: Any, x: Tensor, kit: Kit) -> Tensor:
        return norm(x) if why_not(norm) is not None else kit.rms_norm(x, norm.weight, eps=norm.variance_epsilon)

    # ------------------------------------------------------------------ MLP and experts

    def _mlp(self, x: Tensor, kit: Kit, scale: float) -> Tensor:
        layer: Any = self.module
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        weight = None
        if why_not(mlp) is None and why_not(norm) is None and activation_is_silu(mlp):
            weight = self.linears("gate_up", mlp.gate_proj, mlp.up_proj)
        if weight is None:
            return x + mlp(self._normed(norm, x, kit)) * scale
        inner = kit.ops.norm_gate_up_swiglu(x, norm.weight, weight, eps=norm.variance_epsilon)
        down = self.linears("down", mlp.down_proj)
        return x + mlp.down_proj(inner) * scale if down is None else kit.ops.linear_add(inner, down, x, scale=scale)

    def _experts(self, x: Tensor, kit: Kit, scale: float) -> Tensor:
        layer: Any = self.module
        moe, shared, norm = moe_of(layer), shared_of(layer), layer.post_attention_layernorm
        eps = norm.variance_epsilon
        if any(why_not(part) is not None for part in (moe, moe.router, norm)) or why_not_experts(moe.experts) is not None:
            h = self._normed(norm, x, kit)
            branch = moe(h)
            return x + (branch if shared is None else branch + shared(h)) * scale
        h, chosen, shares = kit.ops.norm_route(x, norm.weight, moe.router.weight, top_k=moe.router.top_k, eps=eps)
        gate_up = self.weight("experts.gate_up", moe.experts.gate_up_proj)
        inner = kit.ops.experts_gate_up_swiglu(h, gate_up, chosen, experts=moe.experts.num_experts)
        if shared is not None:
            x = self._shared(x, shared, norm, kit, scale)
        down = self.weight("experts.down", moe.experts.down_proj)
        return kit.ops.experts_down_add(inner, down, chosen, shares, x, scale=scale)

    def _shared(self, x: Tensor, shared: Any, norm: Any, kit: Kit, scale: float) -> Tensor:
        weight = down = None
        if why_not(shared) is None and activation_is_silu(shared):
            weight, down = self.linears("shared.in", shared.input_linear), self.linears("shared.out", shared.output_linear)
        if weight is None or down is None:
            return x + shared(self._normed(norm, x, kit)) * scale
        inner = kit.ops.norm_gate_up_swiglu(x, norm.weight, weight, eps=norm.variance_epsilon)
        return kit.ops.linear_add(inner, down, x, scale=scale)


def why_not_experts(experts: Any) -> str | None:
    """Why transformers has to run these experts; None where kernels may."""
    if getattr(experts, "_is_expert_parallel", False):
        return "they are spread over several devices"
    if not activation_is_silu(experts):
        return f"their activation is a {type(experts.act_fn).__name__}"
    return why_not(experts)


def attend(kit: Kit, q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float) -> Tensor:
    """Attention of q [batch, tokens, heads, head_dim] over k, v [batch, kv_heads, context, head_dim]: as q."""
    if k.stride() != v.stride() or k.stride()[2:] != (k.shape[3], 1):
        k, v = k.contiguous(), v.contiguous()
    operation = kit.ops.attention_decode if q.shape[0] * q.shape[1] <= DECODE_TOKENS else kit.ops.attention
    return operation(q, k, v, window.lengths, window.starts, scale=scale)
