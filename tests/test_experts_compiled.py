"""The experts as compiled code: no spills, whole 128-bit loads of weights, few instructions a byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from granite_kernels.bench.offline import compiled

from tests import experts_launches

ENTRY = f"{Path(experts_launches.__file__)}:layer"
PRESET = "3.1-1b-a400m"


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "tokens"), [(80, 16), (90, 1), (90, 16), (120, 16)])
def test_a_step(arch: int, tokens: int) -> None:
    sizes = experts_launches.streamed(PRESET, tokens)
    launches = compiled(ENTRY, (arch,), args=(PRESET, tokens), streamed_bytes=sizes, dram_bytes=sizes)
    assert [launch.name for launch in launches] == list(sizes)
    for launch in launches:
        assert launch.spills == launch.spill_bytes == 0, launch.name
        assert set(launch.streamed_widths) == {128}
        assert launch.instructions_per_byte is not None
        assert launch.instructions_per_byte <= 0.08, launch.name
        assert launch.in_flight_per_sm(132, streamed=True) >= 16 << 10
        assert launch.pdl == (arch >= 90) == (launch.grid_dependency == 2)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_a_prompt(arch: int) -> None:
    launches = compiled(ENTRY, (arch,), args=(PRESET, 2048))
    products = [launch for launch in launches if launch.name == "_grouped_kernel"]
    assert len(launches) == 5
    for launch in launches:
        assert launch.spills == launch.spill_bytes == 0, launch.name
        assert launch.shared <= 99 << 10
    for launch in products:
        assert any(name.startswith("HGMMA" if arch == 90 else "HMMA") for name in launch.tensor_core), launch.tensor_core
        assert launch.async_copies > 0
