"""Attention of the few query tokens of a decode step: by definition the same as in prefill."""

from __future__ import annotations

from torch import Tensor

from granite_kernels.reference.attention import attention


def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor, *, scale: float) -> Tensor:
    """As `granite_kernels.reference.attention.attention`, meant for 1 to 16 tokens over a long cache."""
    return attention(q, k_cache, v_cache, lengths, starts, scale=scale)
