"""One decode step of a model with real sizes and one layer, for launch capture: what the tests of compiled code look at."""

from __future__ import annotations

from granite_kernels.bench.offline.examine import STEP, run_step


def decode(preset: str, batches: list[int], arch: int, context: int = 1024) -> None:
    for batch in batches:
        run_step(STEP, preset, "none", batch, context, 1, arch)
