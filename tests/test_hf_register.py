"""attn_implementation="granite_kernels" and experts_implementation="granite_kernels": our functions in transformers' own tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from granite_kernels.model.hf import interfaces
from granite_kernels.model.hf.session import Session

import granite_kernels
from tests import tiny, tiny_hf

BY_NAME = {"attn_implementation": "granite_kernels", "experts_implementation": "granite_kernels"}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    granite_kernels.register()
    granite_kernels.register()  # again is the same


@pytest.mark.parametrize("kind", tiny_hf.KINDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_tokens_are_identical(kind: str, cache: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    stock = tiny_hf.make(kind)
    model = AutoModelForCausalLM.from_pretrained(tiny.save(stock, tmp_path), **BY_NAME)
    options = dict(max_new_tokens=32, do_sample=False, eos_token_id=None, cache_implementation=cache)
    for prompts in (tiny_hf.padded_prompts(3, 10), {"input_ids": tiny.prompts(1, 17)}):
        assert torch.equal(model.generate(**prompts, **options), stock.generate(**prompts, **options))


def test_status_knows_what_was_asked_for_by_name() -> None:
    model = tiny_hf.make("granitemoe")
    assert len(granite_kernels.status(model)) == 1
    model.set_attn_implementation("granite_kernels")
    model.set_experts_implementation("granite_kernels")
    kernels = [row.kernel for row in granite_kernels.status(model)]
    experts = [f"reference.moe.experts_{name}" for name in ("gate_up_swiglu", "down_add")]
    assert kernels == ["reference.attention.attention", *experts, "transformers"]


def test_gradients_are_those_of_transformers() -> None:
    stock, model, ids = tiny_hf.make("granitemoe"), tiny_hf.make("granitemoe"), tiny.prompts(2, 9)
    model.set_attn_implementation("granite_kernels")
    model.set_experts_implementation("granite_kernels")
    for one in (stock, model):
        one(ids, labels=ids).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(stock.parameters(), model.parameters(), strict=True))


def test_accelerate_and_the_names_go_together() -> None:
    model, ids = tiny_hf.make("granitemoe"), tiny.prompts(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("granite_kernels")
        assert tiny.spread_error(model(ids).logits, expected) < 1e-5
        granite_kernels.accelerate(model, backend="torch")
        assert tiny.spread_error(model(ids).logits, expected) < 1e-5


class Layer:
    num_key_value_groups, is_causal, training = 2, True, False


def masks(tokens: int, context: int) -> dict[str, Any]:
    slots, queries = torch.arange(context), torch.arange(tokens)[:, None]
    padded = ((slots >= 3) & (slots <= context - tokens + queries))[None, None].expand(2, 1, tokens, context)
    return {
        "none": None,
        "padded": padded,
        "additive": torch.where(padded, 0.0, torch.finfo(torch.float32).min),
        "half a static cache": ((slots <= 5 + queries) & (slots >= 0))[None, None].expand(2, 1, tokens, context),
        "none of ours": (padded & (slots != 4)),
    }


@pytest.mark.parametrize("kind", list(masks(1, 8)))
@pytest.mark.parametrize(("tokens", "context"), [(1, 20), (12, 20), (20, 20)])
def test_attention_in_triton_equals_sdpa(kind: str, tokens: int, context: int) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention = interfaces.Attention()
    attention.session = Session("triton")
    mask = masks(tokens, context)[kind]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, tokens, 32, generator=generator)
    k, v = (torch.randn(2, 1, context, 32, generator=generator) for _ in range(2))
    found, _ = attention(Layer, q, k, v, mask, scaling=0.2)
    expected, _ = sdpa_attention_forward(Layer, q, k, v, mask, scaling=0.2)
    real = torch.ones(2, tokens, dtype=torch.bool) if mask is None else (mask[:, 0] == (0 if kind == "additive" else 1)).any(-1)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
