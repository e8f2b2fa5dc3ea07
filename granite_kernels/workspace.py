"""Scratch memory of the kernels whose programs meet: tickets (zero before and after every launch) and partial results."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Workspace:
    """One per model; launches on one stream share it, since each is done with it before the next begins to write.

    tickets int32 [n], zeroed once: the last program to take a ticket sets it back to zero, so that a captured graph can replay.
    partials float32 [m], never read before it was written in the same launch.
    """

    tickets: Tensor
    partials: Tensor

    @classmethod
    def allocate(cls, tickets: int, partials: int, device: torch.device | str) -> Workspace:
        return cls(torch.zeros(tickets, dtype=torch.int32, device=device), torch.empty(partials, dtype=torch.float32, device=device))

    @property
    def nbytes(self) -> int:
        return 4 * (self.tickets.numel() + self.partials.numel())

    def need(self, tickets: int, partials: int) -> None:
        if self.tickets.numel() < tickets or self.partials.numel() < partials:
            have = (self.tickets.numel(), self.partials.numel())
            raise ValueError(f"the workspace holds {have} tickets and partial sums, {(tickets, partials)} are needed")
