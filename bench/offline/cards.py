"""Graphics cards and their architectures: the limits that a launch meets and the bandwidth it is held against.

Limits of architectures: CUDA C++ Programming Guide, "Compute Capabilities". Cards: NVIDIA's data sheets and architecture
white papers (SMs, boost clock, memory bandwidth). The issue budget of a card is the number of warp instructions that its
schedulers can issue (one each and clock, four an SM) in the time in which one byte comes from DRAM:

    budget = SMs * 4 * clock / bandwidth        [warp instructions a byte]

A kernel that needs more instructions a byte than that can't run at the speed of the memory, however well it hides latency;
half the budget is a fair aim, since schedulers are never all busy. H100 and H200 run the same code on different budgets.
"""

from __future__ import annotations

import dataclasses

SCHEDULERS = 4  # per SM, on all architectures from sm_80 on


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Limits of a compute capability; bytes of shared memory, 32-bit registers."""

    number: int
    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536


@dataclasses.dataclass(frozen=True)
class Card:
    """SMs, boost clock in GHz, bandwidth in GB/s (10^9 bytes)."""

    name: str
    arch: int
    sms: int
    clock: float
    bandwidth: float

    @property
    def issue_budget(self) -> float:
        """Warp instructions that can be issued while one byte comes from DRAM."""
        return self.sms * SCHEDULERS * self.clock / self.bandwidth

    @property
    def issue_rate(self) -> float:
        """Warp instructions a second."""
        return self.sms * SCHEDULERS * self.clock * 1e9


KIB = 1024
ARCHITECTURES = {
    limits.number: limits
    for limits in (
        Architecture(80, 163 * KIB, 164 * KIB, 64, 32),
        Architecture(86, 99 * KIB, 100 * KIB, 48, 16),
        Architecture(89, 99 * KIB, 100 * KIB, 48, 24),
        Architecture(90, 227 * KIB, 228 * KIB, 64, 32),
        Architecture(100, 227 * KIB, 228 * KIB, 64, 32),
        Architecture(120, 99 * KIB, 100 * KIB, 48, 24),
    )
}

# The first card of an architecture stands for it where none is named.
CARDS = (
    Card("A100 80GB", 80, 108, 1.41, 2039),
    Card("RTX 3090", 86, 82, 1.695, 936),
    Card("A10", 86, 72, 1.695, 600),
    Card("RTX 4090", 89, 128, 2.52, 1008),
    Card("L4", 89, 58, 2.04, 300),
    Card("L40S", 89, 142, 2.52, 864),
    Card("H100 SXM", 90, 132, 1.755, 3350),
    Card("H200", 90, 132, 1.755, 4800),
    Card("B200", 100, 148, 1.85, 8000),
    Card("RTX 5090", 120, 170, 2.41, 1792),
)


def cards_of(arch: int) -> list[Card]:
    """The cards of an architecture (80, 86, 89, 90, 100 or 120); ValueError for another."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture sm_{arch} is unknown; there are {', '.join(f'sm_{number}' for number in ARCHITECTURES)}")
    return [card for card in CARDS if card.arch == arch]
