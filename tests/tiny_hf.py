"""Tiny models of transformers whose text doesn't repeat, and a tokenizer for them: what the tests of the seams share."""

from __future__ import annotations

from typing import Any

import torch

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
