"""A warm-up compiles all that requests to a mixture of experts need, however short the context that it was given."""

from __future__ import annotations

import pytest
from granite_kernels.bench.offline.child import in_child
from granite_kernels.model.warmup import steps

from tests import served_moe


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "arch"), [("3.1-1b-a400m", 90), ("3.1-3b-a800m", 80)])
def test_requests_compile_nothing_new(preset: str, arch: int) -> None:
    result = in_child(f"{served_moe.__file__}:warmed", preset, arch, 12, 40, interpret=False)
    assert result["new"] == []
    assert result["grouped"] == 4  # gate|up and down, of few choices an expert and of many
    layer = ("_norm_qkv_rope_append", "_attention_decode", "_linear_add", "_norm_route", "_experts_gate_up_swiglu", "_experts_down_add")
    counted = {f"{name}_kernel": served_moe.LAYERS for name in layer}
    assert result["step"] == counted | {"_embed_kernel": 1, "_linear_kernel": 1}  # and the one that samples: 6 a layer and 3


def test_the_classes_of_a_step() -> None:
    assert steps(0, 1) == [1, 2, 9]
    assert steps(32, 8) == [1, 2, 5, 9]  # more than 4 tokens may choose more than there are experts
    assert steps(40, 8) == [1, 2, 6, 9]
    assert steps(80, 8) == [1, 2, 9, 11]
