"""What only a GPU shows of `profile`: kernels under their roles, launches that tell their bytes, Proton beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from granite_kernels.bench.profiling import profile
from granite_kernels.bench.proton import record
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.trial import trial

from granite_kernels import GraniteForCausalLM

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> GraniteForCausalLM:
    return GraniteForCausalLM.from_config(dataclasses.replace(GraniteConfig.preset("3.1-2b"), num_hidden_layers=4))


def test_every_role_has_the_time_of_its_kernels(model: GraniteForCausalLM) -> None:
    prefill, decode = profile(model, 256, 6).phases
    for phase in (prefill, decode):
        assert all(role.seconds > 0 for role in phase.roles)
        assert sum(role.seconds for role in phase.roles) < phase.profiled
    kernels = {kernel.role: kernel for kernel in decode.kernels}
    assert kernels["down"].kernel.startswith("_linear_add_kernel")
    assert kernels["down"].calls == 4 * decode.passes
    down = next(role for role in decode.roles if role.role == "down")
    assert kernels["down"].nbytes == down.nbytes
    told = next(kernel for kernel in prefill.kernels if kernel.kernel.startswith("_swiglu_kernel"))
    assert told.nbytes > 0


def test_every_kernel_compiles_and_runs(model: GraniteForCausalLM) -> None:
    assert all(one.error is None for one in trial(model))


def test_proton_writes_its_tree(model: GraniteForCausalLM, tmp_path: Path) -> None:
    path = record(model, 32, 3, tmp_path / "steps.hatchet")
    assert "norm_qkv_rope_append" in path.read_text()
