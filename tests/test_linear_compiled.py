"""The matrix kernels compiled: no spills, wide loads of the planes, few instructions a byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton
from granite_kernels.bench.offline import compiled

from tests import linear_launches

ENTRY = str(Path(linear_launches.__file__))
LIMITS = {  # warp instructions a byte on sm_90, at one token and at more
    "dense": (0.05, 0.06),
    "q4_k": (0.18, 0.28),
    "q6_k": (0.18, 0.28),
    "q8_0": (0.12, 0.18),
}


def check(operation: str, format: str, tokens: int, archs: tuple[int, ...]) -> None:
    for launch in compiled(f"{ENTRY}:{operation}", archs, args=(format, tokens), streamed=("planes",)):
        assert launch.spills == 0, f"sm_{launch.arch}: {launch.spills} spills at {launch.registers} registers"
        assert launch.streamed_widths[128] > 0
        assert min(launch.streamed_widths) >= (128 if format == "dense" else 16)  # scales are of 16 bits
        if launch.arch == 90 and triton.__version__.startswith("3.7"):
            assert launch.instructions_per_byte is not None
            assert launch.instructions_per_byte <= LIMITS[format][tokens > 1]


def test_codes_of_four_bits() -> None:
    check("gate_up", "q4_k", 1, (90,))


@pytest.mark.slow
@pytest.mark.parametrize(("format", "tokens"), [("dense", 16), ("q6_k", 1), ("q8_0", 1)])
def test_gate_and_up(format: str, tokens: int) -> None:
    check("gate_up", format, tokens, (80, 90, 120))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 16])
def test_down(tokens: int) -> None:
    check("down", "q4_k", tokens, (90,))
