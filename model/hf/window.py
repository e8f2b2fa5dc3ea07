"""transformers' attention masks as what our kernels read: causal, and left padding as a first slot for each row."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Window:
    """Query t of row b sees slots starts[b] .. lengths[b] + t; both int32 [batch]."""

    lengths: Tensor
    starts: Tensor


def causal(held: int | Tensor, batch: int, device: torch.device) -> Window:
    """Without a mask: all slots in front of the queries are in use, `held` of them (a static cache knows it on the device alone)."""
    if isinstance(held, Tensor):
        lengths = held.to(device, torch.int32).expand(batch).contiguous()
    else:
        lengths = torch.full((batch,), held, dtype=torch.int32, device=device)
    return Window(lengths, torch.zeros_like(lengths))


def masked(mask: Any, batch: int, tokens: int) -> Window | None:
    """The window that a mask for `tokens` queries describes; None where it describes something else.

    mask: bool or additive [batch or 1, 1, tokens, context], or [batch, context] with ones for what is no padding. One look from
    the host at what the device holds.
    """
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, batch):
        return None
    context = mask.shape[-1]
    slots = torch.arange(context, device=mask.device)
    if mask.dim() == 2:
        starts = (~mask.bool()).sum(-1)
        lengths = torch.full_like(starts, context - tokens)
        same = ((slots >= starts[:, None]) == mask.bool()).all()
    elif mask.dim() == 4 and mask.shape[1:3] == (1, tokens):
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        last = seen[:, -1].int()
        starts = last.argmax(-1)
        lengths = context - last.flip(-1).argmax(-1) - tokens
        ends = lengths[:, None] + torch.arange(tokens, device=mask.device)
        same = (seen == ((slots >= starts[:, None, None]) & (slots <= ends[:, :, None]))).all() & (lengths >= 0).all()
    else:
        return None
    if not bool(same):
        return None
    return Window(*(part.to(torch.int32).expand(batch).contiguous() for part in (lengths, starts)))
