"""What we know of transformers' models: which ones, where their parts are, and what keeps our hands off a module."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import ACT2CLS
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import output_capturing

from granite_kernels.errors import GraniteError

from ..config import GraniteConfig

SUPPORTED = ("GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM", "LlamaForCausalLM")
CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"  # its name in theirs, from 5.24 and before it
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def causal_lm(model: Any) -> Any:
    """The supported model that `model` is, or that it wraps as PEFT's models do. Raises GraniteError."""
    if isinstance(model, nn.Module):
        found = [m for m in model.modules() if type(m).__name__ in SUPPORTED and type(m).__module__.startswith("transformers.models.")]
        if len(found) == 1:
            return found[0]
    raise GraniteError(f"{type(model).__name__} isn't supported; expected transformers' {', '.join(SUPPORTED)}")


def hooked(module: nn.Module) -> bool:
    """Whether something would see or change what goes through `module.__call__` now.

    transformers leaves its own hooks behind once hidden states were asked for; they do nothing while nobody collects.
    """
    state = module.__dict__
    hooks = [hook for name in HOOKS for hook in state[name].values()]
    theirs = all(getattr(hook, "__module__", "") == output_capturing.__name__ for hook in hooks)
    return not theirs or (bool(hooks) and output_capturing._active_collector.get() is not None)


def foreign_forward(module: nn.Module) -> Any:
    """The forward that another library put into this instance; None where the class's runs, be it by a bound copy of it, or ours."""
    forward = module.__dict__.get("forward")
    if forward is None or getattr(forward, "is_ours", False):
        return None
    stock = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return None if stock else forward


def why_not(module: nn.Module) -> str | None:
    """Why `module` has to be called as it stands; None where a kernel may do its work. Asked for each part on each call."""
    state = module.__dict__  # Module's own lookup of an attribute costs some microseconds
    if "_hf_hook" in state:
        return "accelerate's hooks move its weights"
    if "forward" in state and foreign_forward(module) is not None:
        return "another library's forward stands in this instance"
    any_hooks = state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
    if any_hooks and hooked(module):
        return "hooks are registered on it"
    for name, parameter in state["_parameters"].items():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter.is_meta:
            return f"its {name} isn't loaded (meta)"
    return None


def why_not_linear(module: nn.Module) -> str | None:
    """As `why_not`, for a projection: nn.Linear itself, without a bias."""
    if type(module) is not nn.Linear:
        return f"it is {type(module).__module__.split('.')[0]}'s {type(module).__name__}"
    if module.__dict__["_parameters"]["bias"] is not None:
        return "it has a bias"
    return why_not(module)


def activation_is_silu(module: nn.Module) -> bool:
    return type(getattr(module, "act_fn", getattr(module, "activation", None))) is ACT2CLS["silu"]


def moe_of(layer: nn.Module) -> Any:
    """The mixture of experts of a layer; None in a dense one."""
    return getattr(layer, "block_sparse_moe", None)


def shared_of(layer: nn.Module) -> Any:
    """The shared expert of a layer, or None."""
    return getattr(layer, "shared_mlp", None)


def projections(layer: Any) -> dict[str, nn.Module]:
    """The linear modules of a layer under their names in it."""
    attention = layer.self_attn
    found = {f"self_attn.{name}": getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    if moe_of(layer) is None:
        found |= {f"mlp.{name}": getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
    elif shared_of(layer) is not None:
        found |= {f"shared_mlp.{name}": getattr(layer.shared_mlp, name) for name in ("input_linear", "output_linear")}
    return found


def why_not_shared(lm: Any) -> str | None:
    """Why our engine can't work on the weights of this model, naming the module in the way; None where it can."""
    linears = {"lm_head": lm.lm_head}
    others = {"model.embed_tokens": lm.model.embed_tokens, "model.norm": lm.model.norm}
    for index, layer in enumerate(lm.model.layers):
        prefix = f"model.layers.{index}."
        linears |= {prefix + name: module for name, module in projections(layer).items()}
        others |= {prefix + name: getattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm")}
    reasons = {name: why_not_linear(module) for name, module in linears.items()}
    reasons |= {name: why_not(module) for name, module in others.items()}
    for name, reason in reasons.items():
        if reason is not None:
            return f"{name} can't be shared: {reason}; merge adapters first, and load the weights unquantized on one device"
    parameters = list(lm.parameters())
    for what, kinds in (("dtype", {p.dtype for p in parameters}), ("device", {p.device for p in parameters})):
        if len(kinds) != 1:
            return f"the weights are of {', '.join(sorted(map(str, kinds)))}: one {what} is needed, as model.to gives"
    return None


def sizes(lm: Any) -> GraniteConfig:
    """The model's sizes; what only transformers' own code reads, biases and scaled rotations, is left out."""
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": False, "mlp_bias": False}
    return GraniteConfig.from_dict(lm.config.to_dict() | plain, source=f"the configuration of this {type(lm).__name__}")
