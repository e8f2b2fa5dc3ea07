"""The seams to transformers on a GPU: compiled kernels under their models, and the captured step in their generate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from granite_kernels.model.graph import CapturedStep
from granite_kernels.model.hf import decode

import granite_kernels
from granite_kernels.testing import assert_accurate
from tests import tiny_hf

pytestmark = pytest.mark.gpu
GREEDY: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}


def prompts() -> dict[str, torch.Tensor]:
    return {name: tensor.to("cuda") for name, tensor in tiny_hf.padded_prompts(2, 9).items()}


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_tokens_are_identical_on_kernels(kind: str) -> None:
    model = tiny_hf.make(kind).to("cuda")
    options = ({}, {"cache_implementation": "static", "disable_compile": True})
    expected = [model.generate(**prompts(), **GREEDY, **more) for more in options]
    granite_kernels.accelerate(model, backend="triton", strict=True)
    for more, tokens in zip(options, expected, strict=True):
        assert torch.equal(model.generate(**prompts(), **GREEDY, **more), tokens)


def test_bfloat16_keeps_the_accuracy_rule() -> None:
    model = tiny_hf.make().to("cuda", torch.bfloat16)
    with torch.no_grad():
        exact, eager = copy.deepcopy(model).double()(**prompts()).logits, model(**prompts()).logits
        found = granite_kernels.accelerate(model, backend="triton")(**prompts()).logits
    real = prompts()["attention_mask"].bool()
    assert_accurate(found[real], exact[real], eager[real])


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.3}])
def test_fast_decode_replays_a_graph_and_gives_the_same_tokens(more: dict[str, Any]) -> None:
    model = tiny_hf.make().to("cuda")
    expected = model.generate(**prompts(), **GREEDY, **more)
    for _ in range(2):
        assert torch.equal(model.generate(**prompts(), **GREEDY, **more, custom_generate=granite_kernels.fast_decode), expected)
    captured = decode.ENGINES[model][1]._captured
    assert captured is not None
    assert isinstance(captured[1], CapturedStep)
