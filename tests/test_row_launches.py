"""The row-wise kernels as compiled code: no spills, whole 128-bit loads where rows allow them."""

from __future__ import annotations

from pathlib import Path

import pytest
from granite_kernels.bench.offline import compiled

from tests import row_launches

ENTRY = str(Path(row_launches.__file__))


ARCHS = (80, 90, 120)


@pytest.mark.slow
def test_rows_compile_without_spills() -> None:
    launches = compiled(f"{ENTRY}:rows", ARCHS)
    assert len(launches) == 10 * len(ARCHS)
    for launch in launches:
        assert launch.spills == launch.spill_bytes == 0, launch.name
        if launch.name in ("_rms_norm_kernel", "_add_rms_norm_kernel", "_swiglu_kernel"):
            assert set(launch.load_widths) == {128}, launch.name
        if launch.name == "_norm_route_kernel":
            assert launch.load_widths[128] == 8  # 32 values of the router a thread; the rest is one token's row
        if launch.name == "_rope_append_kernel":
            assert min(launch.load_widths) >= 32, launch.load_widths
            assert launch.registers <= 64


@pytest.mark.slow
def test_the_choice_of_a_token_compiles_without_spills() -> None:
    launches = compiled(f"{ENTRY}:choice", ARCHS)
    assert len(launches) == len(ARCHS)
    for launch in launches:
        assert launch.spills == launch.spill_bytes == 0
        assert launch.blocks_per_sm >= 1
        assert set(launch.loop_widths) == {128}  # the keys, of which the passes are made
        assert launch.loop_instructions < 240  # for 16 keys a thread and their masses
