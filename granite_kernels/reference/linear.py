"""x @ weight.T, alone and fused with what stands before and after it in a Granite layer.

`weight` is a Weight [rows, columns] (see granite_kernels/weight.py); x [batch, tokens, columns]. Each operation is its unfused
steps in the model's order, each rounded to the dtype of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.reference.norm import rms_norm
from granite_kernels.reference.rope import append, rotate
from granite_kernels.reference.swiglu import swiglu
from granite_kernels.weight import Weight, dense_matrix

HALVES = (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., columns] @ weight.T: [..., rows]."""
    products = [product(x, dense_matrix(part, x.dtype)) for part in weight.parts]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., columns] @ matrix.T, both dense and of one dtype."""
    return F.linear(x.float(), matrix.float()).to(x.dtype) if slow_in_16_bits(x) else F.linear(x, matrix)


def slow_in_16_bits(x: Tensor) -> bool:
    """Whether float32 is the faster detour for a product with x: without 16-bit instructions PyTorch's product of many rows is some
    fifty times slower than float32's; both sum in float32.
    """
    return x.device.type == "cpu" and x.dtype in HALVES and x.shape[:-1].numel() > 4 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear_add(x: Tensor, weight: Weight, residual: Tensor, *, scale: float) -> Tensor:
    """residual + (x @ weight.T) * scale: a branch joins the stream. residual [..., rows]."""
    y = linear(x, weight)
    return residual + y if scale == 1.0 else residual + y * scale


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
) -> Tensor:
    """Norm, the q|k|v product, rotation of q and k, and the write of k and v into the cache. Returns q.

    x [batch, tokens, hidden]; norm [hidden]; weight [(heads + 2 kv_heads) * head_dim, hidden], rows q | k | v; rotary
    [positions, head_dim] (cos | sin); positions int32 [batch, tokens]; lengths int32 [batch], slots in use before this call;
    k_cache, v_cache [batch, kv_heads, context, head_dim]. Returns q [batch, tokens, heads, head_dim].
    """
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    qkv = linear(rms_norm(x, norm, eps=eps), weight).unflatten(-1, (-1, head_dim))
    heads = qkv.shape[2] - 2 * kv_heads
    rotated = rotate(qkv[:, :, : heads + kv_heads], rotary, positions)
    append(k_cache, rotated[:, :, heads:], lengths)
    append(v_cache, qkv[:, :, heads + kv_heads :], lengths)
    return rotated[:, :, :heads]


def norm_gate_up_swiglu(x: Tensor, norm: Tensor, weight: Weight, *, eps: float) -> Tensor:
    """silu(gate) * up of the normed x: weight [2 * inner, hidden], rows gate | up. Returns [..., inner]."""
    return swiglu(linear(rms_norm(x, norm, eps=eps), weight))


def norm_logits(x: Tensor, norm: Tensor, weight: Weight, *, eps: float, scaling: float) -> Tensor:
    """Logits [..., vocab] of the normed x, divided by `scaling` (Granite's logits_scaling)."""
    logits = linear(rms_norm(x, norm, eps=eps), weight)
    return logits if scaling == 1.0 else logits / scaling
