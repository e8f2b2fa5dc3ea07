"""GGUF files of tiny models, written with gguf's own writer and quantizers under llama.cpp's names and permutation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # what gguf's quantizer writes

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
}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: the halves interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def write(model: Any, path: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write the dense Granite `model` with its matrices as `kind`; returns the state dict that the file's values make."""
    config = model.config
    writer = gguf.GGUFWriter(path, "granite")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    values = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.float().numpy()
        heads = (
            {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.rsplit("_proj", 1)[0][-1], 0)
            if "self_attn" in name
            else 0
        )
        stored = permute(array, heads) if heads else array
        if array.ndim == 1:
            writer.add_tensor(llama_name(name), stored, raw_dtype=Type.F32)
            values[name] = tensor
            continue
        quantized = gguf.quants.quantize(stored, Type[kind])
        writer.add_tensor(llama_name(name), quantized, raw_dtype=Type[kind])
        # blocks run along a row, so the values of a permuted row are those of the row itself
        values[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(array, Type[kind]), Type[kind]).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
