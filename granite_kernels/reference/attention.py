"""Causal grouped-query attention over the cache: softmax(scale * q k^T) v, scores and softmax in float32 or wider.

Query t of row b stands at slot lengths[b] + t and sees slots starts[b] .. lengths[b] + t; a query before its row's start
(left padding) sees nothing and yields zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(lengths: Tensor, starts: Tensor, tokens: int, context: int) -> Tensor:
    """Which slots each query may read: bool [batch, 1, tokens, context]."""
    slot = torch.arange(context, device=lengths.device)
    query = lengths[:, None] + torch.arange(tokens, device=lengths.device)
    return ((slot <= query[:, :, None]) & (slot >= starts[:, None, None]))[:, None]


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor, *, scale: float) -> Tensor:
    """q [batch, tokens, heads, head_dim]; k_cache, v_cache [batch, kv_heads, context, head_dim], this call's keys included;
    lengths int32 [batch], slots in use before this call; starts int32 [batch], first slot of each row that is not padding.
    Returns [batch, tokens, heads, head_dim].
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads, context = k_cache.shape[1:3]
    if q.device.type == "cpu":  # sizes on the host are free there: read no slot beyond the last query, and mask only if needed
        held = lengths.tolist()
        context = max(held) + tokens
        k_cache, v_cache = k_cache.narrow(2, 0, context), v_cache.narrow(2, 0, context)
        if tokens == 1 and min(held) == max(held) and not any(starts.tolist()):
            grouped = q.view(batch, kv_heads, heads // kv_heads, head_dim)  # a group's heads are the rows of one product
            return F.scaled_dot_product_attention(grouped, k_cache, v_cache, scale=scale).view(q.shape)
    mask = visible(lengths, starts, tokens, context)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k_cache, v_cache, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads)
    return out.transpose(1, 2).masked_fill(~mask.any(-1).transpose(1, 2)[..., None], 0.0)
