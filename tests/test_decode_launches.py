"""The launches of a decode step, bfloat16, batch 1, 4 and 16: how many, and what the compiler made of them.

Thresholds are kept by version of Triton.
"""

from __future__ import annotations

import pytest
import triton
from granite_kernels.bench.offline import compiled
from granite_kernels.bench.offline.cards import ARCHITECTURES, cards_of
from granite_kernels.model.config import GraniteConfig

from tests import step_launches

BATCHES = [1, 4, 16]
MATRICES = ("_norm_qkv_rope_append_kernel", "_linear_add_kernel", "_norm_gate_up_swiglu_kernel", "_linear_kernel")
LAYER = [MATRICES[0], "_attention_decode_kernel", MATRICES[1], MATRICES[2], MATRICES[1]]
BUDGET = {(3, 6): 0.08, (3, 7): 0.08}  # warp instructions a byte of a matrix kernel on sm_90, prologue included
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
PRESETS = [pytest.param("3.1-2b", id="2b"), pytest.param("3.1-8b", id="8b", marks=pytest.mark.slow)]
ARCHS = [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.slow)]


def weights(preset: str) -> list[int]:
    """Bytes of the matrices of a layer and of the head, in the order of their launches."""
    config = GraniteConfig.preset(preset)
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * head_dim
    return [2 * hidden * size for size in (rows, config.num_attention_heads * head_dim, 2 * inner, inner, config.vocab_size)]


@pytest.mark.thorough
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arch", ARCHS)
def test_decode_launches(preset: str, arch: int) -> None:
    launches = compiled(f"{step_launches.__file__}:decode", (arch,), args=(preset, BATCHES, arch), streamed=("planes",))
    assert [launch.name for launch in launches] == ["_embed_kernel", *LAYER, "_linear_kernel", "_sample_kernel"] * len(BATCHES)
    for launch in launches:
        assert launch.spills == 0, launch
        assert launch.shared <= ARCHITECTURES[arch].shared_per_block
        assert launch.pdl == (arch >= 90)
    matrices = [launch for launch in launches if launch.name in MATRICES]
    for number, (launch, size) in enumerate(zip(matrices, weights(preset) * len(BATCHES), strict=True)):
        assert set(launch.streamed_widths) == {128}, launch
        sms = cards_of(arch)[0].sms
        if arch == 90:
            assert launch.dynamic_instructions is not None
            assert launch.dynamic_instructions <= BUDGET[VERSION] * size, launch
            flight = 24 << 10 if number < 10 else 22 << 10  # at 16 tokens o of 2B stays below the aim of 24 KiB
            assert launch.in_flight_per_sm(sms) >= min(flight, 0.8 * size / sms), launch
