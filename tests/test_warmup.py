"""A warm-up compiles all that requests need: Granite 2B's matrices, served under launch capture in a process of its own."""

from __future__ import annotations

import pytest
from granite_kernels.bench.offline.child import in_child

from tests import served


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.slow)])
def test_fifty_requests_compile_nothing_new(arch: int) -> None:
    result = in_child(f"{served.__file__}:warmed", arch, 50, interpret=False)
    assert result["new"] == []
    assert len(result["kernels"]) == 11  # of a dense model in bfloat16, prefill's row-wise ones included
