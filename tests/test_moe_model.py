"""Whole mixtures of experts against transformers: tiny checkpoints on both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from granite_kernels import GraniteForCausalLM
from tests import experts_launches, tiny, tiny_hf

# experts, chosen, heads, kv heads, size of the shared expert
MIXTURES = {"8 top 2": (8, 2, 4, 2, 0), "10 top 4": (10, 4, 6, 2, 0), "40 top 8": (40, 8, 4, 2, 0), "shared": (8, 2, 6, 2, 96)}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hf.large_tiles(monkeypatch)
    experts_launches.large_tiles(monkeypatch)


FIRST, *OTHERS = MIXTURES


@pytest.fixture(scope="module", params=[FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    experts, chosen, heads, kv_heads, shared = MIXTURES[request.param]
    kind, more = ("granitemoeshared", {"shared_intermediate_size": shared}) if shared else ("granitemoe", {})
    sizes = {"num_local_experts": experts, "num_experts_per_tok": chosen, "head_dim": 32, "num_hidden_layers": 1}
    theirs = tiny.make(kind, heads=heads, kv_heads=kv_heads, **sizes, **more)
    return theirs, tiny.save(theirs, tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logits_equal_transformers(pair: tuple[Any, Path], backend: str) -> None:
    """Of prompts, and of a step behind them."""
    theirs, folder = pair
    ours = GraniteForCausalLM.from_pretrained(folder, device="cpu", backend=backend)
    assert all(row.active == (backend == "triton") for row in ours.kernels())
    for batch, tokens in ((1, 5), (3, 7)):  # what a step's kernels take, and more
        ids = tiny.prompts(batch, tokens)
        with torch.no_grad():
            expected = theirs(ids).logits
            prompt = ours(ids[:, :-1])
            step = ours(ids[:, -1:], past_key_values=prompt.past_key_values)
        assert tiny.spread_error(torch.cat((prompt.logits, step.logits), 1), expected) < 1e-4


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sixteen_rows_equal_transformers(pair: tuple[Any, Path], backend: str) -> None:
    """A step whose rows choose different experts, and one whose rows all choose the same."""
    theirs, folder = pair
    ours = GraniteForCausalLM.from_pretrained(folder, device="cpu", backend=backend)
    for ids in (tiny.prompts(16, 1), tiny.prompts(1, 1).expand(16, 1)):
        with torch.no_grad():
            assert tiny.spread_error(ours(ids).logits, theirs(ids).logits) < 1e-4


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_greedy_tokens_equal_transformers(pair: tuple[Any, Path], backend: str) -> None:
    theirs, folder = pair
    ours = GraniteForCausalLM.from_pretrained(folder, device="cpu", backend=backend)
    ids = tiny.prompts(2, 9)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, max_new_tokens=3, eos_token_id=[]), expected)
