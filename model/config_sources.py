"""What a config.json in either dialect of transformers, and GGUF metadata, say in GraniteConfig's names.

Dialects of config.json: transformers 4 writes `rope_theta`, `rope_scaling`, `torch_dtype`; transformers 5 writes
`rope_parameters{rope_theta, rope_type}` and `dtype`. What would change the result and isn't computed here (biases, RoPE
scaling, another activation) is refused, never ignored. Ranges are config_checks' business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from granite_kernels.errors import GraniteError

from .config_checks import ARCHITECTURES, DTYPES, Refusals

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
DEFAULT_THETA = 10000.0

_GGUF_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_GGUF_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_GGUF_OTHER = {
    "vocab_size": "vocab_size",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "shared_intermediate_size": "expert_shared_feed_forward_length",
}
GGUF_ARCHITECTURES = ("granite", "granitemoe", "llama")


def dict_values(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """GraniteConfig's fields, unchecked, from the content of a config.json."""
    if not isinstance(raw, Mapping):
        raise GraniteError(f"{source}: holds {type(raw).__name__}; expected an object with the fields of a configuration")
    refuse = Refusals(source)
    architecture = raw.get("model_type")
    if architecture not in ARCHITECTURES:
        raise refuse.error("model_type", architecture, "one of the supported architectures, " + ", ".join(ARCHITECTURES))
    needed: tuple[str, ...] = SIZES if architecture == "llama" else SIZES + MULTIPLIERS
    if architecture in ("granitemoe", "granitemoeshared"):
        needed += ("num_local_experts", "num_experts_per_tok")
    _require(raw, {field: field for field in needed}, source)
    _refuse_variants(raw, refuse)
    values = {field: raw[field] for field in needed} | {
        "architecture": architecture,
        "num_key_value_heads": _default(raw, "num_key_value_heads", raw["num_attention_heads"]),
        "head_dim": _head_dim(raw.get("head_dim"), raw["hidden_size"], raw["num_attention_heads"], refuse),
        "max_position_embeddings": _default(raw, "max_position_embeddings", 2048),
        "rms_norm_eps": _default(raw, "rms_norm_eps", 1e-6),
        "rope_theta": _rope_theta(raw, refuse),
        "tie_word_embeddings": _default(raw, "tie_word_embeddings", False),
        "bos_token_id": _token(raw.get("bos_token_id")),
        "eos_token_id": eos_tokens(raw.get("eos_token_id")),
        "pad_token_id": _token(raw.get("pad_token_id")),
        "dtype": _dtype(raw, refuse),
    }
    if architecture == "granitemoeshared":
        values["shared_intermediate_size"] = _default(raw, "shared_intermediate_size", 0)
    return values if architecture != "llama" else values | neutral_multipliers(values["head_dim"])


def gguf_values(metadata: Mapping[str, Any], source: str, vocab_size: int | None) -> dict[str, Any]:
    """GraniteConfig's fields, unchecked, from a GGUF file's pairs; dtype and tied head are the caller's to add."""
    architecture = metadata.get("general.architecture")
    supported = ", ".join(GGUF_ARCHITECTURES)
    if architecture not in GGUF_ARCHITECTURES:
        refuse = Refusals(source, {"architecture": "general.architecture"})
        raise refuse.error("architecture", architecture, f"one of the supported architectures, {supported}")
    keys = gguf_keys(architecture)
    refuse = Refusals(source, keys)
    experts = metadata.get(keys["num_local_experts"], 0)
    needed = list(_GGUF_SIZES)
    if architecture != "llama":
        needed += _GGUF_MULTIPLIERS
    if architecture == "granitemoe":
        needed += ("num_local_experts", "num_experts_per_tok")
    _require(metadata, {field: keys[field] for field in needed}, source)
    values = {field: _shortest(metadata[keys[field]]) for field in needed}
    heads = values["num_attention_heads"]
    values |= {
        "architecture": architecture,
        "vocab_size": metadata.get(keys["vocab_size"], vocab_size),
        "num_key_value_heads": metadata.get(keys["num_key_value_heads"], heads),
        "head_dim": _head_dim(metadata.get(keys["head_dim"]), values["hidden_size"], heads, refuse),
        "rope_theta": _shortest(metadata.get(keys["rope_theta"], DEFAULT_THETA)),
        "bos_token_id": _token(metadata.get("tokenizer.ggml.bos_token_id")),
        "eos_token_id": eos_tokens([metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]),
        "pad_token_id": _token(metadata.get("tokenizer.ggml.padding_token_id")),
    }
    if architecture == "granitemoe":
        values["shared_intermediate_size"] = metadata.get(keys["shared_intermediate_size"], 0)
        if values["shared_intermediate_size"]:
            values["architecture"] = "granitemoeshared"
    elif experts:
        raise refuse.error("num_local_experts", experts, f"none for the dense architecture {architecture}")
    _refuse_gguf_variants(metadata, architecture, values["head_dim"], refuse)
    return values if architecture != "llama" else values | neutral_multipliers(values["head_dim"])


def gguf_keys(architecture: str) -> dict[str, str]:
    """GraniteConfig's field -> the key of a GGUF file."""
    prefix = "granitemoe" if architecture == "granitemoeshared" else architecture
    return {field: f"{prefix}.{key}" for field, key in (_GGUF_SIZES | _GGUF_MULTIPLIERS | _GGUF_OTHER).items()}


def neutral_multipliers(head_dim: object) -> dict[str, float]:
    """Llama as Granite: nothing is scaled but the scores, by 1/sqrt(head_dim)."""
    usable = isinstance(head_dim, int) and head_dim > 0  # the range checks refuse anything else
    attention = 1 / math.sqrt(head_dim) if isinstance(head_dim, int) and usable else 1.0
    return {
        "embedding_multiplier": 1.0,
        "attention_multiplier": attention,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def eos_tokens(found: object) -> tuple[Any, ...]:
    """A config's eos_token_id (none, one, or a list) as a tuple without repetitions."""
    ids = found if isinstance(found, (list, tuple)) else [found]
    return tuple(dict.fromkeys(token for token in ids if _token(token) is not None)) if _hashable(ids) else (found,)


def _hashable(ids: list[Any] | tuple[Any, ...]) -> bool:
    return all(not isinstance(token, (list, dict)) for token in ids)


def _token(found: object) -> Any:
    return None if found is None or found == -1 else found  # early Llama configs write -1 for "none"


def _default(raw: Mapping[str, Any], field: str, default: Any) -> Any:
    value = raw.get(field)
    return default if value is None else value


def _require(raw: Mapping[str, Any], keys: Mapping[str, str], source: str) -> None:
    missing = [key for key in keys.values() if raw.get(key) is None]
    if missing:
        raise GraniteError(f"{source}: {', '.join(missing)} missing; expected a value for each, as the model's publisher wrote it")


def _head_dim(found: object, hidden: object, heads: object, refuse: Refusals) -> Any:
    if found is not None:
        return found
    if not isinstance(hidden, int) or not isinstance(heads, int) or hidden < 1 or heads < 1:
        return None  # the range checks name the culprit
    if hidden % heads:
        raise refuse.error("hidden_size", hidden, f"a multiple of {refuse.key('num_attention_heads')}, {heads}")
    return hidden // heads


def _dtype(raw: Mapping[str, Any], refuse: Refusals) -> torch.dtype:
    field = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    found = raw.get(field)
    name = "float32" if found is None else str(found).removeprefix("torch.")
    if name not in DTYPES:
        raise refuse.error(field, found, "one of " + ", ".join(DTYPES))
    return DTYPES[name]


def _rope_theta(raw: Mapping[str, Any], refuse: Refusals) -> Any:
    theta = raw.get("rope_theta")
    for field in ("rope_scaling", "rope_parameters"):
        found = raw.get(field)
        if found is None:
            continue
        if not isinstance(found, Mapping):
            raise refuse.error(field, found, "an object or null")
        plain = set(found) <= {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
        kind = found.get("rope_type", found.get("type", "default" if plain else None))
        if kind != "default":
            raise refuse.error(field, found, "null or rope_type 'default'; no RoPE scaling is supported")
        if found.get("partial_rotary_factor", 1) not in (None, 1):
            raise refuse.error(field, found, "a partial_rotary_factor of 1")
        theta = found.get("rope_theta", theta)
    return DEFAULT_THETA if theta is None else theta


def _refuse_variants(raw: Mapping[str, Any], refuse: Refusals) -> None:
    for field in ("attention_bias", "mlp_bias"):
        if raw.get(field):
            raise refuse.error(field, raw[field], "false; projections with a bias aren't supported")
    if raw.get("hidden_act", "silu") not in ("silu", "swish", None):
        raise refuse.error("hidden_act", raw["hidden_act"], "silu")
    if raw.get("partial_rotary_factor", 1) not in (None, 1):
        raise refuse.error("partial_rotary_factor", raw["partial_rotary_factor"], "1")
    if raw.get("position_embedding_type", "rope") not in (None, "rope"):
        raise refuse.error("position_embedding_type", raw["position_embedding_type"], "rope")


def _refuse_gguf_variants(metadata: Mapping[str, Any], architecture: str, head_dim: object, refuse: Refusals) -> None:
    for key in ("rope.dimension_count", "attention.value_length"):
        found = metadata.get(f"{architecture}.{key}", head_dim)
        if found != head_dim:
            raise refuse.error(f"{architecture}.{key}", found, f"the size of a head, {head_dim}")
    scaling = f"{architecture}.rope.scaling.type"
    if metadata.get(scaling, "none") != "none":
        raise refuse.error(scaling, metadata[scaling], "none; no RoPE scaling is supported")
    factor = f"{architecture}.rope.scaling.factor"
    if scaling not in metadata and metadata.get(factor, 1.0) not in (0.0, 1.0):
        raise refuse.error(factor, metadata[factor], "1; no RoPE scaling is supported")
    rope = f"{architecture}.rope.scaling.finetuned"  # Granite's converter says with it whether there is RoPE at all
    if architecture != "llama" and metadata.get(rope, True) is False:
        raise refuse.error(rope, False, "true; a Granite without RoPE isn't supported")


def _shortest(found: Any) -> Any:
    """A 32-bit float as the shortest decimal that rounds to it: 0.22, as in config.json, not 0.2199999988079071."""
    return float(str(np.float32(found))) if isinstance(found, float) and math.isfinite(found) else found
