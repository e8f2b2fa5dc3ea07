"""The fused operations as steps, for many tokens: our row-wise kernels around a matrix product, ours or the library's (regimes.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.kernels.norm import rms_norm
from granite_kernels.kernels.rope import rope_append
from granite_kernels.kernels.swiglu import swiglu
from granite_kernels.linear.regimes import is_tiled
from granite_kernels.linear.rows import unpack
from granite_kernels.linear.tiled import tiled
from granite_kernels.weight import DENSE, Part, Weight, dense_matrix
from granite_kernels.workspace import Workspace


def linear(x: Tensor, weight: Weight, *, workspace: Workspace | None = None) -> Tensor:
    """x [..., columns] @ weight.T, a product for each part."""
    if is_tiled(x, weight):
        return tiled(x, weight, workspace=workspace)
    products = [F.linear(x, _matrix(part, x.dtype)) for part in weight.parts]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def linear_add(x: Tensor, weight: Weight, residual: Tensor, *, scale: float, workspace: Workspace | None = None) -> Tensor:
    """residual + (x @ weight.T) * scale, in the product's own epilogue where the weight is one matrix."""
    if is_tiled(x, weight):
        return tiled(x, weight, residual=residual, scale=scale, workspace=workspace)
    if len(weight.parts) > 1:
        return residual + linear(x, weight) * scale
    matrix = _matrix(weight.parts[0], x.dtype)
    rows = residual.reshape(-1, residual.shape[-1])
    return torch.addmm(rows, x.reshape(-1, x.shape[-1]), matrix.T, alpha=scale).view(residual.shape)


def _matrix(part: Part, dtype: torch.dtype) -> Tensor:
    """The values of a part for the library's product; packed ones are decoded for this call."""
    return dense_matrix(part, dtype) if part.format == DENSE else unpack(part, dtype)


def norm_gate_up_swiglu(x: Tensor, norm: Tensor, weight: Weight, *, eps: float, workspace: Workspace | None = None) -> Tensor:
    """silu(gate) * up of the normed x."""
    return swiglu(linear(rms_norm(x, norm, eps=eps), weight, workspace=workspace))


def norm_logits(x: Tensor, norm: Tensor, weight: Weight, *, eps: float, scaling: float, workspace: Workspace | None = None) -> Tensor:
    """Logits of the normed x, divided by `scaling`."""
    logits = linear(rms_norm(x, norm, eps=eps), weight, workspace=workspace)
    return logits if scaling == 1.0 else logits.div_(scaling)


def norm_qkv_rope_append(
    x: Tensor,
    norm: Tensor,
    weight: Weight,
    rotary: Tensor,
    positions: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    eps: float,
    workspace: Workspace | None = None,
) -> Tensor:
    """q of the normed x, rotated; k and v go to the cache."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    qkv = linear(rms_norm(x, norm, eps=eps), weight, workspace=workspace).unflatten(-1, (-1, head_dim))
    heads = qkv.shape[2] - 2 * kv_heads
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    return rope_append(q, k, v, rotary, positions, lengths, k_cache, v_cache)
