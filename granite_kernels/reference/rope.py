"""Rotary position embedding in the rotate-half form, and the write of k and v into the cache.

    (a, b) -> (a cos - b sin, b cos + a sin),  a and b the halves of a head, angle = position * theta^(-2i / head_dim)

The angles are float32 products, as in transformers, tabulated once: a row of `rotary` holds cos | sin of one position.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(context: int, head_dim: int, theta: float, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """cos | sin for positions 0 .. context - 1: [context, head_dim] in `dtype`, from float32 angles."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    angles = torch.arange(context, device=device).float()[:, None] * (1.0 / theta**exponent)[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def rotate(x: Tensor, rotary: Tensor, positions: Tensor) -> Tensor:
    """x [batch, tokens, heads, head_dim] rotated by its positions [batch, tokens]."""
    batch, tokens, heads, head_dim = x.shape
    cos_sin = rotary[positions].view(batch, tokens, 1, 2, 1, head_dim // 2)
    halves = x.view(batch, tokens, heads, 2, head_dim // 2)
    out, crossed = halves * cos_sin[:, :, :, 0], halves * cos_sin[:, :, :, 1]
    out.select(3, 0).sub_(crossed.select(3, 1))
    out.select(3, 1).add_(crossed.select(3, 0))
    return out.view(x.shape)


def append(cache: Tensor, values: Tensor, lengths: Tensor) -> None:
    """Write values [batch, tokens, kv_heads, head_dim] behind the first `lengths` [batch] slots of cache
    [batch, kv_heads, context, head_dim].
    """
    batch, tokens = values.shape[:2]
    if batch == 1 and cache.device.type == "cpu":
        cache.narrow(2, int(lengths), tokens).copy_(values.transpose(1, 2))
        return
    rows = torch.arange(batch, device=cache.device)[:, None]
    cache[rows, :, lengths[:, None].long() + torch.arange(tokens, device=cache.device)] = values


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, positions: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Rotate q and k, store k and v behind what the cache holds, return the rotated q.

    q [batch, tokens, heads, head_dim]; k, v [batch, tokens, kv_heads, head_dim]; rotary [positions, head_dim] (cos | sin);
    positions int32 [batch, tokens]; lengths int32 [batch], slots in use before this call; k_cache, v_cache
    [batch, kv_heads, context, head_dim], written at slots lengths .. lengths + tokens - 1.
    """
    append(k_cache, rotate(k, rotary, positions), lengths)
    append(v_cache, v, lengths)
    return rotate(q, rotary, positions)
