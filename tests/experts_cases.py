"""Calls of the experts' operations: who chooses whom is what they differ in."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from granite_kernels.weight import Weight

NAMES = ("experts_gate_up_swiglu", "experts_down_add")
CHOOSING = ("each its own", "all the same", "one for all")


def choose(tokens: int, experts: int, top_k: int, choosing: str = "each its own") -> Tensor:
    """int32 [1, tokens, top_k]. "one for all": expert 1 is everybody's, at different places, and the last expert nobody's."""
    if choosing == "all the same":
        return torch.randperm(experts)[:top_k].expand(1, tokens, top_k).int().contiguous()
    rows = [torch.randperm(experts)[:top_k] for _ in range(tokens)]
    if choosing == "one for all":
        rows = [torch.cat((torch.tensor([1]), row[(row != 1) & (row != experts - 1)]))[:top_k] for row in rows]
        rows = [(row if len(row) == top_k else torch.arange(top_k))[torch.randperm(top_k)] for row in rows]
    return torch.stack(rows)[None].int()


@dataclasses.dataclass
class Call:
    """One operation on given tensors: `on(module)` runs it for the tensors as they are."""

    name: str
    tensors: dict[str, Tensor]
    experts: int

    def on(self, module: object, dtype: torch.dtype | None = None, **extra: Any) -> Tensor:
        values: dict[str, Any] = {
            name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() and name != "shares" else tensor
            for name, tensor in self.tensors.items()
        }
        if dtype == torch.float64:
            values = {name: tensor.double() if name == "shares" else tensor for name, tensor in values.items()}
        weight = "gate_up" if "gate_up" in values else "down"
        values[weight] = self.matrix(values[weight].dtype)
        scalars = {"experts": self.experts} if weight == "gate_up" else {"scale": 0.22}
        result: Tensor = getattr(module, self.name)(**values, **scalars, **extra)
        return result

    def matrix(self, dtype: torch.dtype) -> Weight:
        """The weight that the operation takes, for a call in `dtype`."""
        return Weight.dense(self.weight.to(dtype))

    @property
    def weight(self) -> Tensor:
        return self.tensors["gate_up"] if "gate_up" in self.tensors else self.tensors["down"]

    def first(self, count: int) -> Call:
        """The same for the first `count` tokens."""
        weights = ("gate_up", "down")
        return dataclasses.replace(self, tensors={n: t if n in weights else t[:, :count].contiguous() for n, t in self.tensors.items()})


def make(
    name: str,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 64,
    inner: int = 32,
    choosing: str = "each its own",
) -> Call:
    chosen = choose(tokens, experts, top_k, choosing)
    if name == "experts_gate_up_swiglu":
        tensors = {"h": torch.randn(1, tokens, hidden), "gate_up": torch.randn(experts * 2 * inner, hidden) * hidden**-0.5}
    else:
        tensors = {
            "inner": torch.randn(1, tokens, top_k, inner),
            "down": torch.randn(experts * hidden, inner) * inner**-0.5,
            "residual": torch.randn(1, tokens, hidden),
        }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"chosen": chosen}
    if name == "experts_down_add":
        tensors["shares"] = torch.rand(1, tokens, top_k).softmax(-1)
    return Call(name, tensors, experts)
