"""Which matrices of a checkpoint are held packed, in which format, and what that weighs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from granite_kernels import formats
from granite_kernels.errors import GraniteError
from granite_kernels.formats.mix import DENSE, HEAD, QUANTIZATIONS, format_of

from .checkpoint import TensorInfo
from .room import fits

EXACT_FIRST = ("q8_0", "q6_k", "q4_k_m", "int4")


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
    tied = HEAD not in tensors
    chosen = {name: format_of(quantization, name, info.shape[-1], layers=layers, tied=tied) for name, info in tensors.items()}
    return {name: format for name, format in chosen.items() if format != DENSE}


def held(
    tensors: Mapping[str, TensorInfo], chosen: Mapping[str, str], *, dtype: torch.dtype, device: torch.device, backend: str
) -> dict[str, str]:
    """The format of every tensor that is held packed: those of `chosen` (see `plan`), and those that the checkpoint holds packed.

    The latter keep their bits, but for one case: plain PyTorch on a CPU decodes a matrix anew for each token, ten times the work of
    multiplying with it. So "auto" decodes them once, to `dtype`, on a CPU with room for that. Who asks for a backend by its name
    gets the weights as they are stored.
    """
    packed = {name: info.format for name, info in tensors.items() if info.packed}
    if backend == "auto" and device.type == "cpu" and fits(stored_bytes(tensors, chosen, dtype), device):
        return dict(chosen)
    return {**packed, **chosen}


def alternatives(tensors: Mapping[str, TensorInfo], layers: int, dtype: torch.dtype) -> dict[str, int]:
    """About what the weights would take, by the option of `from_pretrained` that makes them so, the most exact first."""
    narrower = {"dtype=torch.bfloat16": stored_bytes(tensors, {}, torch.bfloat16)} if dtype == torch.float32 else {}
    if any(info.packed for info in tensors.values()):
        return narrower
    plans = {name: plan(tensors, layers, name, "") for name in EXACT_FIRST}
    return narrower | {f"quantization={name!r}": stored_bytes(tensors, chosen, dtype) for name, chosen in plans.items()}


def stored_bytes(tensors: Mapping[str, TensorInfo], plan: Mapping[str, str], dtype: torch.dtype) -> int:
    """About what the weights take under `plan`, the rest being in `dtype`."""
    bits = {name: formats.get(plan[name]).bits_per_weight if name in plan else 8.0 * dtype.itemsize for name in tensors}
    return int(sum(torch.Size(info.shape).numel() * bits[name] for name, info in tensors.items()) / 8)
