"""GraniteConfig: the shape and the constants of a model, frozen and checked.

Four multipliers make Granite what it is, under transformers' names: `embedding_multiplier` on the embeddings,
`attention_multiplier` as the softmax scale (1/head_dim, not 1/sqrt(head_dim)), `residual_multiplier` on both branches
of a layer and `logits_scaling`, a divisor. A Llama is the same graph with 1, 1/sqrt(head_dim), 1 and 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from granite_kernels.errors import GraniteError

from .config_checks import MOE_ARCHITECTURES, Refusals, check_config, parameter_count
from .config_sources import dict_values, gguf_keys, gguf_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig:
    """A checkpoint's fields under their transformers names.

    Every way to make one raises GraniteError for values that can't be right. `intermediate_size` is that of one expert
    where there are experts; `eos_token_id` holds every id that ends a text; `dtype` is the checkpoint's.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: torch.dtype = torch.bfloat16
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    shared_intermediate_size: int = 0

    def __post_init__(self) -> None:
        check_config(self._values(), Refusals("GraniteConfig"))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config") -> GraniteConfig:
        """From the content of a config.json in the dialect of transformers 4 or 5; `source` names it in errors.

        Sizes and, for Granite, the four multipliers must be there; what else is absent has transformers' default.
        """
        return cls._build(dict_values(raw, source), Refusals(source, {"architecture": "model_type"}))

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        source: str = "gguf",
        vocab_size: int | None = None,
        tie_word_embeddings: bool = True,
        dtype: torch.dtype = torch.bfloat16,
    ) -> GraniteConfig:
        """From a GGUF file's key-value pairs; `vocab_size`, the embedding's rows, is for files without that key."""
        values = gguf_values(metadata, source, vocab_size)
        values |= {"tie_word_embeddings": tie_word_embeddings, "dtype": dtype}
        keys = {"architecture": "general.architecture"} | gguf_keys(values["architecture"])
        return cls._build(values, Refusals(source, keys))

    @classmethod
    def _build(cls, values: dict[str, Any], refuse: Refusals) -> GraniteConfig:
        fields = dataclasses.fields(cls)
        complete: dict[str, Any] = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING} | values
        check_config(complete, refuse)
        for field in fields:
            if field.type == "float":  # JSON has 1 where 1.0 is meant
                complete[field.name] = float(complete[field.name])
        return cls(**complete)

    @classmethod
    def preset(cls, name: str) -> GraniteConfig:
        """One of the Granite 3.1 models: "3.1-2b", "3.1-8b", "3.1-1b-a400m" or "3.1-3b-a800m"."""
        if name not in PRESETS:
            raise GraniteError(f"there is no preset {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(**(_COMMON | PRESETS[name]))

    @property
    def model_type(self) -> str:
        return self.architecture

    @property
    def is_moe(self) -> bool:
        return self.architecture in MOE_ARCHITECTURES

    @property
    def group(self) -> int:
        """Query heads that share a key and value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def cache_bytes_per_token(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of keys and values that one token adds over all layers, in `dtype` (the checkpoint's by default)."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * (dtype or self.dtype).itemsize

    def parameters(self) -> int:
        """Weights of the model; a tied head counts once."""
        return parameter_count(self._values())

    def active_parameters(self) -> int:
        """Weights that one token touches: all of a dense model, the chosen experts of a mixture."""
        return parameter_count(self._values(), experts=self.num_experts_per_tok)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json in the dialect of transformers 5."""
        values = self._values()
        theta, eos = values.pop("rope_theta"), values.pop("eos_token_id")
        architecture = values.pop("architecture")
        for field in ("num_local_experts", "num_experts_per_tok") if not self.is_moe else ():
            del values[field]
        if architecture != "granitemoeshared":
            del values["shared_intermediate_size"]
        if architecture == "llama":
            for field in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"):
                del values[field]
        elif self.head_dim * self.num_attention_heads == self.hidden_size:
            del values["head_dim"]  # Granite's own files have no such key
        values |= {
            "model_type": architecture,
            "architectures": [_CLASSES[architecture]],
            "dtype": str(self.dtype).removeprefix("torch."),
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            "hidden_act": "silu",
            "attention_bias": False,
        }
        return values

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


_CLASSES = {
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "llama": "LlamaForCausalLM",
}

_COMMON: dict[str, Any] = {
    "vocab_size": 49155,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": (0,),
    "pad_token_id": 0,
    "dtype": torch.bfloat16,
}

PRESETS: dict[str, dict[str, Any]] = {
    "3.1-2b": {
        "architecture": "granite",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5_000_000.0,
        "attention_multiplier": 1 / 64,
        "logits_scaling": 8.0,
    },
    "3.1-8b": {
        "architecture": "granite",
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000_000.0,
        "attention_multiplier": 1 / 128,
        "logits_scaling": 16.0,
    },
    "3.1-1b-a400m": {
        "architecture": "granitemoe",
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_500_000.0,
        "attention_multiplier": 1 / 64,
        "logits_scaling": 6.0,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
    },
    "3.1-3b-a800m": {
        "architecture": "granitemoe",
        "hidden_size": 1536,
        "intermediate_size": 512,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000_000.0,
        "attention_multiplier": 1 / 64,
        "logits_scaling": 6.0,
        "num_local_experts": 40,
        "num_experts_per_tok": 8,
    },
}
