"""Which format each tensor of a model gets when it is quantized as a whole.

    int8          every matrix, embedding and head included
    int4          symmetric in groups of 128; embedding and head in int8
    q8_0, q6_k    every matrix
    q4_k_m        llama.cpp's mix (llama-quant.cpp, LLAMA_FTYPE_MOSTLY_Q4_K_M): q4_k, but q6_k for the head, for the embedding
                  where it is the head, and for v and down in the layers that `more_bits` picks

Norms and the router stay dense. A format whose block doesn't divide the columns gives way to one of narrower
blocks, as in llama.cpp.
"""

from __future__ import annotations

import re

from granite_kernels.errors import GraniteError
from granite_kernels.formats import get

QUANTIZATIONS = ("int8", "int4", "q8_0", "q6_k", "q4_k_m")
DENSE = "dense"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NARROWER_BLOCKS = {"int4_g128": "int4_g64", "int4_g64": "int4_g32", "q4_k": "q5_0", "q6_k": "q8_0"}

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_VECTORS = ("input_layernorm", "post_attention_layernorm")
_ROUTER = "block_sparse_moe.router.layer"
_SENSITIVE = ("self_attn.v_proj", "mlp.down_proj", "block_sparse_moe.output_linear", "shared_mlp.output_linear")


def format_of(quantization: str, name: str, columns: int, *, layers: int, tied: bool) -> str:
    """The format of tensor `name` (transformers' names on disk) with rows of `columns`, or "dense" where it isn't quantized.

    `layers`: how many the model has; `tied`: whether the embedding is the head, too. Raises GraniteError for a quantization that
    isn't one of QUANTIZATIONS.
    """
    if quantization not in QUANTIZATIONS:
        raise GraniteError(f"quantization is {quantization!r}, expected one of {', '.join(QUANTIZATIONS)}")
    found = _LAYER.fullmatch(name)
    part = found[2] if found is not None else ""
    if part in _VECTORS or part == _ROUTER or (found is None and name not in (EMBEDDING, HEAD)):
        return DENSE
    format = quantization
    if quantization == "int4":
        format = "int8" if found is None else "int4_g128"
    elif quantization == "q4_k_m":
        if found is None:
            sensitive = tied or name == HEAD
        else:
            sensitive = part in _SENSITIVE and more_bits(int(found[1]), layers)
        format = "q6_k" if sensitive else "q4_k"
    while columns % get(format).block:
        if format not in NARROWER_BLOCKS:
            return DENSE
        format = NARROWER_BLOCKS[format]
    return format


def more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp spends more bits on this layer: the first and the last eighth, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
