"""What `plan` predicts against what the allocator held."""

from __future__ import annotations

import gc

import pytest
import torch
from granite_kernels.bench.plan import footprint, need
from granite_kernels.model.config import GraniteConfig

from granite_kernels import GraniteForCausalLM

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("batch", "prompt"), [(1, 2048), (4, 1000)])
def test_the_prediction_is_within_three_percent_of_what_was_allocated(batch: int, prompt: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    config = GraniteConfig.preset("3.1-2b")
    model = GraniteForCausalLM.from_config(config)
    model.generate(torch.zeros(batch, prompt, dtype=torch.int64), max_new_tokens=24, eos_token_id=[])
    major, minor = torch.cuda.get_device_capability()
    predicted = need(config, footprint(config, None), batch, prompt + 24, 10 * major + minor).total
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.03)
