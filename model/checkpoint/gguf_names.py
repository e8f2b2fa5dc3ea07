"""The names of a GGUF file, and the order of its query and key rows.

llama.cpp turns adjacent pairs in RoPE (x[2i], x[2i+1]) where transformers turns halves (x[i], x[i + head_dim/2]), so
its converter permutes the rows of q and k within each head: row 2i + j of the file is row j * head_dim/2 + i of
transformers. Blocks run along the columns, so that moving whole packed rows back loses nothing.
"""

from __future__ import annotations

from torch import Tensor

from ..config import GraniteConfig
from .layout import EMBEDDING, HEAD

_MODEL = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.gate_exps": "ffn_gate_exps",
    "block_sparse_moe.up_exps": "ffn_up_exps",
    "block_sparse_moe.output_linear": "ffn_down_exps",
    "shared_mlp.gate_proj": "ffn_gate_shexp",
    "shared_mlp.up_proj": "ffn_up_shexp",
    "shared_mlp.output_linear": "ffn_down_shexp",
}


def gguf_name(name: str) -> str:
    """The name in a GGUF file of the tensor with this canonical name."""
    if name in _MODEL:
        return _MODEL[name]
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def permuted_heads(name: str, config: GraniteConfig) -> int:
    """How many heads the rows of this tensor consist of, where they are permuted; 0 where they aren't."""
    if name.endswith("self_attn.q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("self_attn.k_proj.weight") else 0


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, anything] in the file's order -> the same rows in transformers' order (a copy)."""
    half = rows.shape[0] // heads // 2
    return rows.view(heads, half, 2, -1).transpose(1, 2).reshape(rows.shape)


def permute(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `unpermute`."""
    half = rows.shape[0] // heads // 2
    return rows.view(heads, 2, half, -1).transpose(1, 2).reshape(rows.shape)
