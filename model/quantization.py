"""Which format each matrix gets under `quantization=`, from its name and shape alone.

"q4_k_m" is llama.cpp's mix: Q4_K, but Q6_K for the head (or the tied embedding) and, in the layers that its rule gives more bits,
for attn_v and ffn_down, experts included. Where a row is no multiple of a format's block the next one of its chain steps in, as in
llama.cpp; what no format fits stays as it is. So do norms and the routers of mixtures. llama.cpp's extra bits for mixtures of
exactly eight experts (Mixtral) are left out: no Granite has eight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from granite_kernels import formats
from granite_kernels.errors import GraniteError

from .checkpoint import TensorInfo
from .checkpoint.layout import EMBEDDING, HEAD

QUANTIZATIONS = ("int8", "int4", "q8_0", "q6_k", "q4_k_m")
CHAINS = {  # the format, and what steps in where it doesn't fit
    "q4_k": ("q4_k", "q5_0"),
    "q6_k": ("q6_k", "q8_0"),
    "q8_0": ("q8_0",),
    "int8": ("int8",),
    "int4": ("int4_g128", "int4_g64", "int4_g32"),
}
MORE_BITS = ("self_attn.v_proj.weight", "mlp.down_proj.weight", "block_sparse_moe.output_linear.weight", "shared_mlp.output_linear.weight")


def plan(tensors: Mapping[str, TensorInfo], layers: int, quantization: str | None, source: object) -> dict[str, str]:
    """The name of a format for every tensor of `tensors` (canonical names) that is to be packed; empty without `quantization`.

    Raises GraniteError for an unknown quantization, and for tensors that are packed already.
    """
    if quantization is None:
        return {}
    if quantization not in QUANTIZATIONS:
        raise GraniteError(f"quantization is {quantization!r}, expected None or one of {', '.join(QUANTIZATIONS)}")
    packed = sorted({info.format for info in tensors.values() if info.packed})
    if packed:
        raise GraniteError(
            f"{source}: its weights are already packed ({', '.join(packed)}), and quantizing them again would only lose accuracy; "
            f"expected 16- or 32-bit weights for quantization={quantization!r}, so leave it out"
        )
    head = HEAD if HEAD in tensors else EMBEDDING
    chosen = {
        name: _fitting(_wanted(name, quantization, head, layers), info.shape) for name, info in tensors.items() if _matrix(name, info)
    }
    return {name: format for name, format in chosen.items() if format is not None}


def stored_bytes(tensors: Mapping[str, TensorInfo], plan: Mapping[str, str], dtype: torch.dtype) -> int:
    """About what the weights take under `plan`, the rest being in `dtype`."""
    bits = {name: formats.get(plan[name]).bits_per_weight if name in plan else 8.0 * dtype.itemsize for name in tensors}
    return int(sum(torch.Size(info.shape).numel() * bits[name] for name, info in tensors.items()) / 8)


def has_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's rule: the first and the last eighth of the layers, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _matrix(name: str, info: TensorInfo) -> bool:
    return len(info.shape) > 1 and not name.endswith("router.layer.weight")


def _wanted(name: str, quantization: str, head: str, layers: int) -> str:
    if quantization == "int4":
        return "int8" if name in (EMBEDDING, HEAD) else "int4"
    if quantization != "q4_k_m":
        return quantization
    if name == head:
        return "q6_k"
    if name.endswith(MORE_BITS) and has_more_bits(int(name.split(".")[2]), layers):
        return "q6_k"
    return "q4_k"


def _fitting(wanted: str, shape: tuple[int, ...]) -> str | None:
    return next((name for name in CHAINS[wanted] if shape[-1] % formats.get(name).block == 0), None)
