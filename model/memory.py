"""What a model holds, in bytes by kind."""

from __future__ import annotations

import dataclasses

from torch import nn

from granite_kernels.weight import Part


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of weights (a tied head once), cache and workspace, and the bits that a weight takes on average."""

    weights: int
    cache: int
    workspace: int
    bits_per_weight: float

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("weights", "cache", "workspace", "total")]
        lines = [f"{name:<10}{size:>18,} bytes{size / 1e9:>9.3f} GB" for name, size in rows]
        return "\n".join([*lines, f"{self.bits_per_weight:.2f} bits per weight"])


def measure(weights: nn.Module, *, cache: int, workspace: int) -> Memory:
    """Sum the storage of `weights`; `cache` and `workspace` are bytes."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in (*weights.parameters(), *weights.buffers())}
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    parts = {id(module): module for module in weights.modules() if isinstance(module, Part)}
    values = sum(part.shape[0] * part.shape[1] for part in parts.values())
    values += sum(p.numel() for name, p in weights.named_parameters() if "plane" not in name)
    return Memory(stored, cache, workspace, 8 * stored / values)
