"""What serving Granite 2B compiles, and the launches of its decode step and of 8B's, in bfloat16: a process for each architecture.

Thresholds are kept by version of Triton. `make examine` looks at all architectures, and at what the launches read and write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import triton
from granite_kernels.bench.offline.cards import ARCHITECTURES, cards_of
from granite_kernels.bench.offline.child import in_child
from granite_kernels.model.config import GraniteConfig

from granite_kernels.kernels import attention_decode
from granite_kernels.launch import INTERPRETED, attention_decode_launch, matrix_launch
from granite_kernels.linear.launches import GATE_UP, NEIGHBOURS, blocks_of
from tests import served

STEPS = [("3.1-2b", 1), ("3.1-2b", 4), ("3.1-2b", 16), ("3.1-8b", 1), ("3.1-8b", 16)]
MATRICES = ("_norm_qkv_rope_append_kernel", "_linear_add_kernel", "_norm_gate_up_swiglu_kernel", "_linear_kernel")
LAYER = [MATRICES[0], "_attention_decode_kernel", MATRICES[1], MATRICES[2], MATRICES[1]]
BUDGET = {(3, 6): 0.08, (3, 7): 0.08}  # warp instructions a byte of a matrix kernel on sm_90, prologue included
COLD = 40  # seconds for all that a dense 2B needs, on two cores
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def matrices(preset: str) -> list[tuple[int, int, int]]:
    """Rows, columns and half (see linear/launches.py) of the matrices of a layer and of the head, in the order of their launches."""
    config = GraniteConfig.preset(preset)
    hidden, inner, attended = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    rows = attended + 2 * config.num_key_value_heads * config.head_dim
    layer = [(rows, hidden, config.head_dim // 2), (hidden, attended, NEIGHBOURS), (2 * inner, hidden, GATE_UP)]
    return [*layer, (hidden, inner, NEIGHBOURS), (config.vocab_size, hidden, NEIGHBOURS)]


@pytest.fixture(scope="module", params=[90, pytest.param(80, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.slow)])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that serves and then looks at STEPS tells. Triton's cache is empty at first, so that every kernel is compiled."""
    arch = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        told = in_child(f"{Path(served.__file__)}:examined", arch, 50, STEPS, interpret=False)
    return {"arch": arch, **told}


def test_a_cold_start_compiles_in_seconds(seen: dict[str, Any]) -> None:
    assert 20 <= seen["variants"] <= 40
    assert seen["seconds"] < COLD


def test_fifty_requests_after_it_compile_nothing_new(seen: dict[str, Any]) -> None:
    assert seen["new"] == []
    assert len(seen["kernels"]) == 11  # of a dense model in bfloat16, prefill's row-wise ones included


def test_a_step_of_the_served_batches_needs_nothing_else(seen: dict[str, Any]) -> None:
    assert seen["unseen"] == []


def test_decode_launches(seen: dict[str, Any]) -> None:
    arch = seen["arch"]
    sms = cards_of(arch)[0].sms
    assert len(seen["steps"]) == len(STEPS)
    for (preset, _), launches in zip(STEPS, seen["steps"], strict=True):
        assert [launch["name"] for launch in launches] == ["_embed_kernel", *LAYER, "_linear_kernel", "_sample_kernel"]
        for launch in launches:
            assert launch["local"] == 0, launch  # bytes of local memory, where spilled registers go
            assert launch["shared"] <= ARCHITECTURES[arch].shared_per_block
            assert launch["pdl"] == (arch >= 90)
        for launch, (rows, columns, _) in zip([x for x in launches if x["name"] in MATRICES], matrices(preset), strict=True):
            size = 2 * rows * columns
            assert set(launch["widths"]) == {".v4.b32"}, launch
            if arch == 90:
                assert launch["spills"] == 0
                assert launch["streamed"] == [128]
                assert launch["instructions"] <= BUDGET[VERSION] * size, launch
                assert launch["flight"] >= min(24 << 10, 0.8 * size / sms), launch


@pytest.mark.parametrize("context", [64, 1024, 3136, 12544, 131072])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("preset", ["3.1-2b", "3.1-8b"])
def test_partial_sums_are_two_percent_of_a_step(preset: str, batch: int, context: int) -> None:
    """Written beside the results, of the weights and the cache that are read; the contexts give programs one tile, or four, each."""
    config = GraniteConfig.preset(preset)
    layers, kv_heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    shape = attention_decode_launch(batch, config.group, kv_heads, head_dim, config.dtype, INTERPRETED)
    active = min(-(-context // (shape.block_n << shape.shift)), shape.splits)
    _, all_splits = attention_decode.workspace_size(batch, kv_heads, config.group, head_dim, 1)
    read = 4 * layers * batch * kv_heads * head_dim * context
    written = layers * all_splits * active // shape.splits if active > 1 else 0
    for index, (rows, columns, half) in enumerate(matrices(preset)):
        launch = matrix_launch(rows, columns, batch, INTERPRETED)
        times = 1 if index == 4 else layers
        read += times * 2 * rows * columns
        written += times * launch.workspace(blocks_of((rows,), half, ("dense",), launch))[1]
    assert 4 * written <= 0.02 * read
