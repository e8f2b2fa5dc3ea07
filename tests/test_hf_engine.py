"""from_transformers: our engine over the weights of a transformers model, in their memory."""

from __future__ import annotations

import pytest
import torch

from granite_kernels import GraniteForCausalLM
from granite_kernels.errors import GraniteError
from tests import tiny, tiny_hf


@pytest.mark.parametrize("kind", tiny_hf.KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_equal_and_every_byte_is_shared(kind: str, tied: bool) -> None:
    theirs = tiny_hf.make(kind, tie_word_embeddings=tied)
    ours = GraniteForCausalLM.from_transformers(theirs)
    assert {p.data_ptr() for p in ours.parameters()} == {p.data_ptr() for p in theirs.parameters()}
    prompts = tiny_hf.padded_prompts(2, 9)
    expected = theirs.generate(**prompts, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(**prompts, max_new_tokens=24, eos_token_id=[]), expected)
    assert all(parameter.requires_grad for parameter in theirs.parameters())


def test_kernels_read_the_parts_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hf.large_tiles(monkeypatch)
    theirs, ids = tiny_hf.make_small(), tiny.prompts(1, 9)
    ours = GraniteForCausalLM.from_transformers(theirs, backend="triton")
    assert {p.data_ptr() for p in ours.parameters()} == {p.data_ptr() for p in theirs.parameters()}
    expected = theirs.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, max_new_tokens=6, eos_token_id=[]), expected)


def test_an_edit_in_place_is_seen() -> None:
    theirs, ids = tiny_hf.make(), tiny.prompts(1, 9)
    ours = GraniteForCausalLM.from_transformers(theirs)
    before = ours(ids).logits
    with torch.no_grad():
        theirs.model.layers[1].self_attn.v_proj.weight.mul_(-1)
        after = theirs(ids).logits
    assert tiny.spread_error(ours(ids).logits, after) < 1e-4
    assert tiny.spread_error(before, after) > 1e-2


def test_the_end_tokens_are_those_of_their_generate() -> None:
    theirs = tiny_hf.make()
    theirs.generation_config.eos_token_id = [5, 9]
    assert GraniteForCausalLM.from_transformers(theirs).config.eos_token_id == (5, 9)


def test_what_cannot_be_shared_is_named() -> None:
    import transformers

    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=tiny.VOCAB))
    with pytest.raises(GraniteError, match="GPT2LMHeadModel isn't supported; expected transformers' GraniteForCausalLM, GraniteMoe"):
        GraniteForCausalLM.from_transformers(other)
    biased = tiny_hf.make(attention_bias=True)
    with pytest.raises(GraniteError, match="attention_bias"):
        GraniteForCausalLM.from_transformers(biased)
    hooked = tiny_hf.make()
    hooked.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(GraniteError, match=r"model\.layers\.1\.mlp\.up_proj can't be shared: hooks are registered on it"):
        GraniteForCausalLM.from_transformers(hooked)
    mixed = tiny_hf.make()
    mixed.model.norm.to(torch.bfloat16)
    with pytest.raises(GraniteError, match=r"torch\.bfloat16, torch\.float32: one dtype is needed"):
        GraniteForCausalLM.from_transformers(mixed)


def test_a_release_of_transformers_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model = tiny_hf.make()
    monkeypatch.setattr(transformers, "__version__", "5.2.1")
    with pytest.raises(GraniteError, match=r"needs transformers 5\.15 or newer, found 5\.2\.1: pip install -U transformers"):
        GraniteForCausalLM.from_transformers(model)
    monkeypatch.setattr(transformers, "__version__", "6.0.0.dev0")
    assert GraniteForCausalLM.from_transformers(model).config.num_hidden_layers == model.config.num_hidden_layers
