"""The matrix kernels on packed weights, compiled: no spills, wide loads of the planes, few instructions a byte.

What bfloat16 compiles to is test_decode_launches' matter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import triton
from granite_kernels.bench.offline import compiled
from granite_kernels.bench.offline.metrics import Metrics

from granite_kernels.formats import get
from tests import linear_launches

ENTRY = f"{Path(linear_launches.__file__)}:steps"
ROWS = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}
LIMITS = {"q8_0": (0.12, 0.18), "q4_k": (0.18, 0.28), "q5_k": (0.18, 0.28), "q6_k": (0.18, 0.28)}  # at one token, at more
EVERYWHERE = [("gate_up", "q4_k", 1), ("gate_up", "q6_k", 16)]
HOPPER = [("qkv", "q4_k", 1), ("o", "q5_k", 1), ("down", "q8_0", 1), ("qkv", "q4_k", 16), ("o", "int4_g64_zero", 1)]


def check(launch: Metrics, operation: str, format: str, tokens: int) -> None:
    assert launch.spills == launch.spill_bytes == 0, f"sm_{launch.arch} {operation} {format}: {launch.registers} registers"
    assert launch.streamed_widths[128] > 0
    assert min(launch.streamed_widths) >= 8  # scales are of 16 bits, zero points of 8
    if launch.arch == 90 and triton.__version__.startswith("3.7"):
        assert per_byte(launch, operation, format) <= LIMITS.get(format, (0.18, 0.28))[tokens > 1]


def per_byte(launch: Metrics, operation: str, format: str) -> float:
    """Warp instructions a byte of weights. All lanes that hold sums of a row load its 256 columns' scale, so that the bytes which a
    trip of the loop loads are a few more than it has, and the quotient of both is a little less than its trips.
    """
    assert launch.trips is not None and launch.trips == pytest.approx(round(launch.trips), rel=0.1)
    warp = launch.instructions + (round(launch.trips) - 1) * launch.loop_instructions
    rows, columns = ROWS[operation]
    return warp * launch.num_warps * launch.programs / (rows * columns * get(format).bits_per_weight / 8)


@pytest.mark.slow
def test_a_step() -> None:
    for archs, cases in (((80, 120), EVERYWHERE), ((90,), EVERYWHERE + HOPPER)):
        launches = compiled(ENTRY, archs, args=(cases,), streamed=("planes",))
        assert len(launches) == len(archs) * len(cases)
        for launch, case in zip(launches, cases * len(archs), strict=True):
            check(launch, *case)
