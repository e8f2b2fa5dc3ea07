"""SwiGLU: y = round(silu(gate)) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * inner], the gate first. Returns [..., inner]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
