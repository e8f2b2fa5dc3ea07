"""`quantization=`: which matrices of a checkpoint become which format, and what that weighs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from granite_kernels import formats
from granite_kernels.errors import GraniteError
from granite_kernels.formats.mix import DENSE, HEAD, QUANTIZATIONS, format_of

from .checkpoint import TensorInfo


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


def stored_bytes(tensors: Mapping[str, TensorInfo], plan: Mapping[str, str], dtype: torch.dtype) -> int:
    """About what the weights take under `plan`, the rest being in `dtype`."""
    bits = {name: formats.get(plan[name]).bits_per_weight if name in plan else 8.0 * dtype.itemsize for name in tensors}
    return int(sum(torch.Size(info.shape).numel() * bits[name] for name, info in tensors.items()) / 8)
