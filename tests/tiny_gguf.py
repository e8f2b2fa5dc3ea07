"""GGUF files of tiny models, written with gguf's own writer and quantizers under llama.cpp's names and permutation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from granite_kernels import formats
from tests.packed_cases import random_part

WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # what gguf's quantizer writes
Q4_K_M = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}  # the mix, its other matrices being Q4_K

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.router": "ffn_gate_inp",
    "block_sparse_moe.experts.down_proj": "ffn_down_exps",
    "shared_mlp.output_linear": "ffn_down_shexp",
}
HALVES = {  # gate and up of one tensor of the model
    "block_sparse_moe.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp"),
}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: the halves interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama_names(name: str) -> tuple[str, ...]:
    """llama.cpp's name of a tensor; two where gate and up are one tensor of the model."""
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return (f"{NAMES[stem]}.weight",)
    _, _, layer, rest = stem.split(".", 3)
    return tuple(f"blk.{layer}.{name}.weight" for name in HALVES.get(rest) or (NAMES[rest],))


def blocks(array: np.ndarray, kind: str) -> np.ndarray:
    """Matrices [..., rows, columns] as `kind`; where nobody here quantizes to it, random blocks of about the same spread."""
    if kind in WRITABLE:
        return gguf.quants.quantize(array, Type[kind])
    if array.ndim > 2:
        flat = blocks(array.reshape(-1, array.shape[-1]), kind)
        return flat.reshape(*array.shape[:-1], -1)
    format = formats.get_gguf(kind.lower())
    if kind in ("Q4_K", "Q6_K"):
        return format.blocks(format.quantize(torch.from_numpy(array)), array.shape).numpy()
    part = random_part(kind.lower(), array.shape, seed=array.size)
    planes = list(part.planes)
    ratio = array.std() / format.unpack(planes, array.shape).std().item()
    scales = planes[-1].view(torch.float16)
    planes[-1] = (scales.float() * ratio).half().view(planes[-1].dtype)
    return format.blocks(planes, array.shape).numpy()


def metadata(config: Any) -> Iterator[tuple[str, Any]]:
    """The keys without their architecture."""
    yield "block_count", config.num_hidden_layers
    yield "context_length", config.max_position_embeddings
    yield "embedding_length", config.hidden_size
    yield "feed_forward_length", config.intermediate_size
    yield "attention.head_count", config.num_attention_heads
    yield "attention.head_count_kv", config.num_key_value_heads
    yield "attention.layer_norm_rms_epsilon", config.rms_norm_eps
    yield "rope.freq_base", config.rope_parameters["rope_theta"]
    yield "rope.dimension_count", config.hidden_size // config.num_attention_heads
    yield "vocab_size", config.vocab_size
    yield "attention.scale", config.attention_multiplier
    yield "embedding_scale", config.embedding_multiplier
    yield "residual_scale", config.residual_multiplier
    yield "logit_scale", config.logits_scaling
    if config.model_type != "granite":
        yield "expert_count", config.num_local_experts
        yield "expert_used_count", config.num_experts_per_tok
    if config.model_type == "granitemoeshared":
        yield "expert_shared_feed_forward_length", config.shared_intermediate_size


def permuted_heads(name: str, config: Any) -> int:
    """Heads whose rows llama.cpp permutes; 0 where it doesn't."""
    return config.num_attention_heads if "q_proj" in name else config.num_key_value_heads if "k_proj" in name else 0


def write(model: Any, path: Path, kind: str, kinds: dict[str, str] | None = None) -> dict[str, torch.Tensor]:
    """Write the Granite `model`, dense or a mixture, with its matrices as `kind`, or as `kinds` says for those with a key in
    llama.cpp's name; returns the state dict that the file's values make.
    """
    config = model.config
    architecture = config.model_type.removesuffix("shared")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata(config):
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    values = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        names, heads = llama_names(name), permuted_heads(name, config)
        parts = []
        for stored, part in zip(names, tensor.float().chunk(len(names), dim=-2) if len(names) > 1 else [tensor.float()], strict=True):
            array = part.contiguous().numpy()
            exact = array.ndim == 1 or "ffn_gate_inp" in stored  # norms and the router are never quantized
            own = "F32" if exact else next((other for key, other in (kinds or {}).items() if key in stored), kind)
            quantized = blocks(array, own)
            # blocks run along a row, so the values of a permuted row are those of the row itself
            writer.add_tensor(stored, permute(quantized, heads) if heads else quantized, raw_dtype=Type[own])
            parts.append(torch.from_numpy(gguf.quants.dequantize(quantized, Type[own]).copy()).view(part.shape))
        values[name] = torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
