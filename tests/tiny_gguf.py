"""GGUF files of tiny models, written with gguf's own writer and quantizers under llama.cpp's names and permutation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from granite_kernels import formats
from tests.packed_cases import random_part

WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # what gguf's quantizer writes
Q4_K_M = {"self_attn.v_proj": "Q6_K", "mlp.down_proj": "Q6_K", "embed_tokens": "Q6_K"}  # the mix, its other matrices being Q4_K

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


def blocks(array: np.ndarray, kind: str) -> np.ndarray:
    """A matrix as `kind`; where nobody here quantizes to it, random blocks of about the same spread."""
    if kind in WRITABLE:
        return gguf.quants.quantize(array, Type[kind])
    format = formats.get_gguf(kind.lower())
    if kind in ("Q4_K", "Q6_K"):
        return format.blocks(format.quantize(torch.from_numpy(array)), array.shape).numpy()
    part = random_part(kind.lower(), array.shape, seed=array.size)
    planes = list(part.planes)
    ratio = array.std() / format.unpack(planes, array.shape).std().item()
    scales = planes[-1].view(torch.float16)
    planes[-1] = (scales.float() * ratio).half().view(planes[-1].dtype)
    return format.blocks(planes, array.shape).numpy()


def write(model: Any, path: Path, kind: str, kinds: dict[str, str] | None = None) -> dict[str, torch.Tensor]:
    """Write the dense Granite `model` with its matrices as `kind`, or as `kinds` says for those with a key in their names; returns
    the state dict that the file's values make.
    """
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
        if array.ndim == 1:
            writer.add_tensor(llama_name(name), array, raw_dtype=Type.F32)
            values[name] = tensor
            continue
        own = next((other for key, other in (kinds or {}).items() if key in name), kind)
        quantized = blocks(array, own)
        # blocks run along a row, so the values of a permuted row are those of the row itself
        writer.add_tensor(llama_name(name), permute(quantized, heads) if heads else quantized, raw_dtype=Type[own])
        values[name] = torch.from_numpy(gguf.quants.dequantize(quantized, Type[own]).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
