"""Tiny models of transformers whose text doesn't repeat, and a tokenizer for them: what the tests of the seams share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from granite_kernels import launch
from granite_kernels.launch import MatrixLaunch, Target
from granite_kernels.linear import launches
from tests import tiny

CHAT = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
KINDS = ("granite", "granitemoe", "granitemoeshared", "llama")


def make(kind: str = "granite", seed: int = 0, **config: Any) -> Any:
    """As tiny.make; a head of its own and strong branches, so that every next token depends on all of the text."""
    branches = {} if kind == "llama" else {"embedding_multiplier": 1.5, "residual_multiplier": 0.9}
    shared = {"shared_intermediate_size": 96} if kind == "granitemoeshared" else {}
    return tiny.make(kind, seed, **{"tie_word_embeddings": False, "kv_heads": 2, **branches, **shared, **config})


def tokenizer() -> Any:
    """One word a token: "w0" to "w300"; a chat template; padding on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(tiny.VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0", pad_token="w0", padding_side="left")
    made.chat_template = CHAT
    return made


def padded_prompts(batch: int, tokens: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask; row i has 3 i tokens of padding on the left."""
    ids = tiny.prompts(batch, tokens, seed)
    mask = torch.ones_like(ids)
    for row in range(batch):
        ids[row, : 3 * row] = mask[row, : 3 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def near(model: Any, seed: int = 9) -> Any:
    """A copy whose tokens agree with the model's now and then: an assistant."""
    import copy

    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    return other


def make_small(kind: str = "granite", **config: Any) -> Any:
    """For the interpreter, where a step of `make` takes seconds: one layer of two heads."""
    moe = {"num_local_experts": 4} if "moe" in kind else {}
    return make(kind, **{"heads": 2, "kv_heads": 1, "num_hidden_layers": 1, "intermediate_size": 64, **moe, **config})


def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs with tiles that no GPU would take: a program costs the interpreter some ten milliseconds, whatever its size."""

    def shape(rows: int, columns: int, tokens: int, target: Target, format: str = "dense") -> MatrixLaunch:
        return MatrixLaunch(groups=16, warps=4, splits=1, tokens=8 if tokens <= 8 else 16)

    monkeypatch.setattr(launch, "INTERPRETED", Target(arch=90, sms=1))
    monkeypatch.setattr(launches, "matrix_launch", shape)
