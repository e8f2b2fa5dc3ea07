"""What a model holds, in bytes by kind."""

from __future__ import annotations

import dataclasses

from granite_kernels.weight import Part

from .granite import Weights


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of weights (a tied head once), cache and workspace, the bits that a weight takes on average, and `active`: the bytes of
    those weights that a token reads, which of a mixture are the chosen experts and of an embedding that isn't the head a row.
    """

    weights: int
    cache: int
    workspace: int
    bits_per_weight: float
    active: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("weights", "active", "cache", "workspace", "total")]
        lines = [f"{name:<10}{size:>18,} bytes{size / 1e9:>9.3f} GB" for name, size in rows]
        lines[1] += "  of the weights, read by a token"
        return "\n".join([*lines, f"{self.bits_per_weight:.2f} bits per weight"])


def measure(weights: Weights, *, top_k: int = 0, cache: int = 0, workspace: int = 0) -> Memory:
    """Sum the storage of `weights`, of whose experts a token chooses `top_k`; `cache` and `workspace` are bytes."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in (*weights.parameters(), *weights.buffers())}
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    parts = {id(module): module for module in weights.modules() if isinstance(module, Part)}
    values = sum(part.shape[0] * part.shape[1] for part in parts.values())
    values += sum(p.numel() for name, p in weights.named_parameters() if "plane" not in name)
    idle = 0
    for layer in weights.layers:
        if layer.experts is not None:
            count = layer.experts.router.shape[0]
            idle += (layer.experts.gate_up.nbytes + layer.experts.down.nbytes) * (count - top_k) // count
    if weights.head is not weights.embed:
        rows = weights.embed.shape[0]
        idle += weights.embed.nbytes * (rows - 1) // rows
    return Memory(stored, cache, workspace, 8 * stored / values, stored - idle)
