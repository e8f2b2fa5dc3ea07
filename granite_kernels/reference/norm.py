"""RMSNorm: y = round(x / sqrt(mean(x^2) + eps)) * weight, the mean and the quotient in float32 (float64 for float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalise each row of x [..., hidden]; weight [hidden]. Returns x's shape and dtype."""
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """residual' = residual + x * scale, and its norm: (rms_norm(residual'), residual'). x and residual [..., hidden]."""
    added = residual + (x if scale == 1.0 else x * scale)
    return rms_norm(added, weight, eps=eps), added
