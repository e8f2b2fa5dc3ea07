"""Granite from GGUF, in every type that gguf's quantizer writes, against transformers on the same dequantized values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from granite_kernels import GraniteForCausalLM
from tests import tiny, tiny_gguf


@pytest.mark.parametrize("kind", tiny_gguf.WRITABLE)
def test_logits_and_tokens_equal_the_dequantized_model(kind: str, tmp_path: Path) -> None:
    theirs = tiny.make(heads=6, kv_heads=2)
    values = tiny_gguf.write(theirs, tmp_path / "tiny.gguf", kind)
    theirs.load_state_dict({**theirs.state_dict(), **values, "lm_head.weight": values["model.embed_tokens.weight"]})
    ours = GraniteForCausalLM.from_pretrained(tmp_path / "tiny.gguf", device="cpu", dtype=torch.float32)
    ids = tiny.prompts(2, 33)
    with torch.no_grad():
        assert tiny.spread_error(ours(ids).logits, theirs(ids).logits) < 1e-4
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=16, eos_token_id=0)[:, : expected.shape[1]], expected)


def test_forgetting_the_permutation_would_show(tmp_path: Path) -> None:
    theirs = tiny.make(heads=6, kv_heads=2)
    permuted = {name: value.clone() for name, value in theirs.state_dict().items()}
    for name in permuted:
        if "q_proj" in name or "k_proj" in name:
            permuted[name] = torch.from_numpy(tiny_gguf.permute(permuted[name].numpy(), 6 if "q_proj" in name else 2).copy())
    ids = tiny.prompts(1, 33)
    with torch.no_grad():
        expected = theirs(ids).logits
        theirs.load_state_dict(permuted)
        assert tiny.spread_error(theirs(ids).logits, expected) > 1e-2
