"""Tiny models with the real structure: transformers makes them, our own code never does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 301  # odd, as Granite's


def granite_config(heads: int = 4, kv_heads: int = 1, head_dim: int = 64, **changes: Any) -> dict[str, Any]:
    """A Granite configuration with every multiplier different from 1."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_dim,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 1.0 / head_dim,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "rope_theta": 10000.0,
        **changes,
    }


SHAPES = {  # head size, heads, kv heads: groups of 4, 3 and 2
    "64x4/1": (64, 4, 1),
    "64x6/2": (64, 6, 2),
    "128x4/2": (128, 4, 2),
}


def make(kind: str = "granite", seed: int = 0, **config: Any) -> Any:
    """A float32 transformers model with random weights large enough that the logits differ clearly."""
    import transformers

    classes = {
        "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM, granite_config),
        "granitemoe": (transformers.GraniteMoeConfig, transformers.GraniteMoeForCausalLM, moe_config),
        "granitemoeshared": (transformers.GraniteMoeSharedConfig, transformers.GraniteMoeSharedForCausalLM, moe_config),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, llama_config),
    }
    config_class, model_class, defaults = classes[kind]
    model = model_class(config_class(**defaults(**config))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                gain = 4.5 if "q_proj" in name or "k_proj" in name else 1.5  # attention must matter: its scale is 1 / head_dim
                scale = 0.3 if "embed" in name else gain / parameter.shape[-1] ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def moe_config(num_local_experts: int = 8, num_experts_per_tok: int = 2, **changes: Any) -> dict[str, Any]:
    """A mixture-of-experts configuration of the same kind."""
    settings = {"intermediate_size": 64, "num_local_experts": num_local_experts, "num_experts_per_tok": num_experts_per_tok, **changes}
    return granite_config(**settings)


def llama_config(**changes: Any) -> dict[str, Any]:
    """A Llama configuration: Granite's without its multipliers."""
    config = granite_config(**changes)
    for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"):
        config.pop(name)
    return config


def save(model: Any, folder: Path, *, sharded: bool = False) -> Path:
    """Write `model` as transformers does."""
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3 if sharded else "5GB")
    return folder


def prompts(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Random token ids that never are the padding token."""
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def spread_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the spread of the expected logits."""
    return ((actual - expected).abs().max() / (expected.max() - expected.min())).item()
