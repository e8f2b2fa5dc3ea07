"""How every kernel is run by its tests: traced, on outputs full of NaN, in three orders of its programs that must agree to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from granite_kernels.bench.offline.traffic import Launch, Order, trace
from torch import Tensor

ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")
MARGIN = 64  # elements on either side of a guarded tensor
GUARD = {torch.uint8: 0xA5, torch.int32: -(2**31), torch.int64: -(2**63)}


@contextmanager
def nan_filled() -> Iterator[None]:
    """Fresh tensors are full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def run(call: Callable[[], Sequence[Tensor]], orders: Sequence[Order] = ORDERS) -> tuple[list[Tensor], list[Launch]]:
    """The tensors that `call` made or changed, and the launches of the first order.

    `call` starts from the same state each time, so that it copies what it changes. Asserts that the trace met no race and no stray
    access, and that every order gives the same bits.
    """
    first: list[Tensor] = []
    launches: list[Launch] = []
    for order in orders:
        with nan_filled(), trace(race=order == orders[0], order=order) as traced:
            tensors = [tensor.clone() for tensor in call()]
        assert not traced.problems, traced.problems
        if not first:
            first, launches = tensors, traced.launches
        assert [same_bits(a, b) for a, b in zip(tensors, first, strict=True)] == [True] * len(first), order
    return first, launches


def cost(module: ModuleType, launch: Launch, args: dict[str, Any], function: str = "_cost") -> dict[str, Any]:
    """What the launch metadata of the module's kernels says of a launch, which only a compiled launch would ask for."""
    return getattr(module, function)(launch.grid, SimpleNamespace(name=launch.name), args)


class Guarded:
    """A copy of a tensor in the middle of a larger buffer, whose margins tell whether anyone wrote there."""

    def __init__(self, tensor: Tensor) -> None:
        self.fill = GUARD.get(tensor.dtype, float("nan"))
        self.buffer = torch.full((tensor.numel() + 2 * MARGIN,), self.fill, dtype=tensor.dtype)
        self.tensor = self.buffer[MARGIN:-MARGIN].view(tensor.shape).copy_(tensor)

    def check(self) -> None:
        margins = torch.cat((self.buffer[:MARGIN], self.buffer[-MARGIN:]))
        assert same_bits(margins, torch.full_like(margins, self.fill)), "written outside of the tensor"
