"""GraniteConfig: presets, both dialects of config.json, GGUF metadata, and the values that are refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from granite_kernels.model.config import PRESETS, GraniteConfig

from granite_kernels.errors import GraniteError
from tests import tiny

# granite.md's table of derived numbers: parameters, bytes of cache a token in 16 bits, heads in a group
PUBLISHED = {
    "3.1-2b": (2_533_531_648, 80 * 1024, 4),
    "3.1-8b": (8_170_848_256, 160 * 1024, 4),
    "3.1-1b-a400m": (1_334_628_352, 48 * 1024, 2),
    "3.1-3b-a800m": (3_298_793_472, 64 * 1024, 3),
}


def raw(**changes: Any) -> dict[str, Any]:
    return {"model_type": "granite", **tiny.granite_config(), **changes}


def raw_moe(**changes: Any) -> dict[str, Any]:
    return {"model_type": "granitemoe", **tiny.moe_config(), **changes}


def gguf_metadata(architecture: str = "granite", **changes: Any) -> dict[str, Any]:
    keys = {
        "block_count": 2,
        "context_length": 2048,
        "embedding_length": 256,
        "feed_forward_length": 192,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,  # what 1e-5 is in 32 bits
        "rope.freq_base": 10000.0,
    }
    if architecture != "llama":
        keys |= {
            "attention.scale": 1 / 64,
            "embedding_scale": 12.0,
            "residual_scale": 0.2199999988079071,
            "logit_scale": 6.0,
        }
    pairs = {f"{architecture}.{key}": value for key, value in keys.items()}
    return {"general.architecture": architecture, "tokenizer.ggml.eos_token_id": 0, **pairs, **changes}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name: str) -> None:
    config = GraniteConfig.preset(name)
    assert (config.parameters(), config.cache_bytes_per_token(torch.float16), config.group) == PUBLISHED[name]
    assert math.isclose(config.attention_multiplier, 1 / config.head_dim)
    active = {"3.1-1b-a400m": 428.6e6, "3.1-3b-a800m": 882.8e6}.get(name, config.parameters())
    assert config.active_parameters() == pytest.approx(active, rel=3e-4)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(GraniteError, match=r"'3.1-70b'.*3\.1-2b, 3\.1-8b"):
        GraniteConfig.preset("3.1-70b")


@pytest.mark.parametrize("kind", ["granite", "granitemoe", "granitemoeshared", "llama"])
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(kind: str) -> None:
    model = tiny.make(kind)
    theirs = model.config
    ours = GraniteConfig.from_dict(theirs.to_dict())
    assert ours.model_type == kind
    assert ours.parameters() == sum(parameter.numel() for parameter in model.parameters())
    back = type(theirs)(**ours.to_dict())
    for field in dataclasses.fields(ours):
        expected = getattr(theirs, field.name, None)
        if expected is not None:
            assert getattr(back, field.name) == expected, field.name
    assert back.rope_parameters == theirs.rope_parameters
    assert GraniteConfig.from_dict(ours.to_dict()) == ours


def test_both_dialects_say_the_same() -> None:
    four = raw(rope_theta=5e6, rope_scaling=None, torch_dtype="bfloat16")
    five = raw(rope_parameters={"rope_theta": 5e6, "rope_type": "default"}, dtype="bfloat16")
    del five["rope_theta"]
    assert GraniteConfig.from_dict(four) == GraniteConfig.from_dict(five)
    assert GraniteConfig.from_dict(five).rope_theta == 5e6
    assert GraniteConfig.from_dict(five).dtype == torch.bfloat16


def test_llama_has_neutral_multipliers_and_its_own_head_size() -> None:
    config = GraniteConfig.from_dict({"model_type": "llama", **tiny.llama_config(), "head_dim": 32})
    multipliers = (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling)
    assert (config.head_dim, config.attention_multiplier, multipliers) == (32, 1 / math.sqrt(32), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(("found", "expected"), [(5, (5,)), ([5, 7, 5], (5, 7)), (None, ()), (-1, ())])
def test_end_tokens_come_as_one_or_many(found: object, expected: tuple[int, ...]) -> None:
    assert GraniteConfig.from_dict(raw(eos_token_id=found)).eos_token_id == expected


REFUSED = {
    "no heads": raw(num_attention_heads=0),
    "heads not a multiple of kv heads": raw(num_key_value_heads=3),
    "no kv heads": raw(num_key_value_heads=0),
    "negative hidden size": raw(hidden_size=-256),
    "absurd hidden size": raw(hidden_size=2**40),
    "hidden size of 5,000 digits": raw(hidden_size=10**4000),
    "hidden size not a multiple of heads": raw(hidden_size=250),
    "odd head size": raw(head_dim=63),
    "zero layers": raw(num_hidden_layers=0),
    "absurd layers": raw(num_hidden_layers=10**9),
    "sizes that multiply to too much": raw(vocab_size=2**24, hidden_size=2**17, num_attention_heads=2**9),
    "boolean size": raw(vocab_size=True),
    "size as text": raw(vocab_size="301"),
    "fractional size": raw(intermediate_size=192.5),
    "size as a list": raw(max_position_embeddings=[2048]),
    "NaN multiplier": raw(embedding_multiplier=float("nan")),
    "infinite multiplier": raw(residual_multiplier=float("inf")),
    "multiplier as text": raw(attention_multiplier="0.1"),
    "zero divisor": raw(logits_scaling=0.0),
    "missing multiplier": raw(attention_multiplier=None),
    "missing size": raw(num_hidden_layers=None),
    "epsilon of 1": raw(rms_norm_eps=1),
    "negative theta": raw(rope_theta=-1.0),
    "linear RoPE": raw(rope_scaling={"type": "linear", "factor": 2.0}),
    "llama3 RoPE": raw(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
    "RoPE of no type": raw(rope_scaling={"factor": 2.0}),
    "RoPE scaling as text": raw(rope_scaling="linear"),
    "partial RoPE": raw(rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}),
    "no RoPE": raw(position_embedding_type="nope"),
    "attention bias": raw(attention_bias=True),
    "mlp bias": raw(mlp_bias=True),
    "gelu": raw(hidden_act="gelu"),
    "another architecture": raw(model_type="gpt2"),
    "no architecture": raw(model_type=None),
    "float64": raw(dtype="float64"),
    "end token outside the vocabulary": raw(eos_token_id=tiny.VOCAB),
    "end token as text": raw(eos_token_id="</s>"),
    "end tokens nested": raw(eos_token_id=[[1]]),
    "negative pad token": raw(pad_token_id=-2),
    "tied as text": raw(tie_word_embeddings="yes"),
    "more chosen experts than experts": raw_moe(num_experts_per_tok=9),
    "no experts": raw_moe(num_local_experts=0),
    "no chosen experts": raw_moe(num_experts_per_tok=0),
    "missing experts": raw_moe(num_local_experts=None),
}
NAMED = {
    "no heads": "num_attention_heads is 0",
    "heads not a multiple of kv heads": "num_attention_heads is 4; expected a multiple of num_key_value_heads, 3",
    "absurd hidden size": "hidden_size is 1099511627776",
    "odd head size": "head_dim is 63; expected an even number",
    "NaN multiplier": "embedding_multiplier is nan; expected a finite number",
    "missing multiplier": "attention_multiplier missing",
    "linear RoPE": "rope_scaling is .*linear.*no RoPE scaling is supported",
    "another architecture": "model_type is 'gpt2'; expected one of .*granite, granitemoe, granitemoeshared, llama",
    "more chosen experts than experts": "num_experts_per_tok is 9; expected 1 to num_local_experts, 8",
    "boolean size": "vocab_size is True; expected an integer",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_cannot_be_right_is_refused(case: str) -> None:
    with pytest.raises(GraniteError, match="^some/config.json: .*" + NAMED.get(case, "")) as refusal:
        GraniteConfig.from_dict(REFUSED[case], source="some/config.json")
    assert "expected" in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_a_list_is_no_configuration() -> None:
    with pytest.raises(GraniteError, match="holds list"):
        GraniteConfig.from_dict([1])  # type: ignore[arg-type]  # the mistake under test


def test_values_are_checked_however_a_configuration_is_made() -> None:
    with pytest.raises(GraniteError, match="num_hidden_layers is 0"):
        dataclasses.replace(GraniteConfig.preset("3.1-2b"), num_hidden_layers=0)


def test_gguf_metadata_say_the_same_as_config_json() -> None:
    ours = GraniteConfig.from_gguf(gguf_metadata(), vocab_size=tiny.VOCAB, dtype=torch.float32)
    theirs = GraniteConfig.from_dict(raw(bos_token_id=None, pad_token_id=None))
    assert ours == theirs


def test_gguf_mixture_of_experts() -> None:
    experts = {"granitemoe.expert_count": 8, "granitemoe.expert_used_count": 2, "granitemoe.vocab_size": 99}
    config = GraniteConfig.from_gguf(gguf_metadata("granitemoe", **experts))
    assert (config.architecture, config.num_local_experts, config.num_experts_per_tok, config.vocab_size) == (
        "granitemoe",
        8,
        2,
        99,
    )
    shared = gguf_metadata("granitemoe", **experts, **{"granitemoe.expert_shared_feed_forward_length": 48})
    config = GraniteConfig.from_gguf(shared)
    assert (config.architecture, config.shared_intermediate_size) == ("granitemoeshared", 48)


def test_gguf_llama_without_theta_or_vocabulary() -> None:
    metadata = gguf_metadata("llama", **{"tokenizer.ggml.eot_token_id": 3})
    del metadata["llama.rope.freq_base"]
    config = GraniteConfig.from_gguf(metadata, vocab_size=77)
    assert (config.rope_theta, config.vocab_size, config.attention_multiplier) == (10000.0, 77, 1 / 8)
    assert config.eos_token_id == (0, 3)


GGUF_REFUSED = {
    "another architecture": (
        gguf_metadata(**{"general.architecture": "qwen2"}),
        "general.architecture is 'qwen2'; expected one of",
    ),
    "no architecture": ({}, "general.architecture is None; expected one of .*granite, granitemoe, llama"),
    "RoPE scaling": (gguf_metadata(**{"granite.rope.scaling.type": "yarn"}), "granite.rope.scaling.type is 'yarn'"),
    "RoPE factor": (gguf_metadata(**{"granite.rope.scaling.factor": 4.0}), "granite.rope.scaling.factor is 4.0"),
    "no RoPE": (gguf_metadata(**{"granite.rope.scaling.finetuned": False}), "granite.rope.scaling.finetuned is False"),
    "partial RoPE": (gguf_metadata(**{"granite.rope.dimension_count": 32}), "granite.rope.dimension_count is 32"),
    "kv heads by layer": (
        gguf_metadata(**{"granite.attention.head_count_kv": [1, 1]}),
        r"granite.attention.head_count_kv is \[1, 1\]; expected",
    ),
    "experts in a llama": (gguf_metadata("llama", **{"llama.expert_count": 8}), "llama.expert_count is 8"),
    "no layers": (gguf_metadata(**{"granite.block_count": 0}), "granite.block_count is 0; expected an integer from 1"),
    "scale of 0": (
        gguf_metadata(**{"granite.attention.scale": 0.0}),
        "granite.attention.scale is 0.0; expected a finite number",
    ),
}


@pytest.mark.parametrize("case", GGUF_REFUSED)
def test_gguf_metadata_that_cannot_be_right_are_refused(case: str) -> None:
    metadata, message = GGUF_REFUSED[case]
    with pytest.raises(GraniteError, match="^some.gguf: " + message):
        GraniteConfig.from_gguf(metadata, source="some.gguf", vocab_size=77)


def test_missing_scale_keys_of_a_gguf_are_all_named() -> None:
    metadata = gguf_metadata()
    for key in ("attention.scale", "embedding_scale", "residual_scale", "logit_scale"):
        del metadata[f"granite.{key}"]
    names = r"granite\.embedding_scale, granite\.attention\.scale, granite\.residual_scale, granite\.logit_scale missing"
    with pytest.raises(GraniteError, match=names):
        GraniteConfig.from_gguf(metadata, vocab_size=77)
