"""The model against transformers: tiny checkpoints, float32, every position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from granite_kernels.model import generate as generation
from granite_kernels.model import room

from granite_kernels import GraniteForCausalLM
from granite_kernels.errors import GraniteError
from tests import tiny


@pytest.fixture(scope="module", params=list(tiny.SHAPES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, GraniteForCausalLM]:
    """(transformers' model, ours loaded from its checkpoint); one of the shapes is sharded."""
    head_dim, heads, kv_heads = tiny.SHAPES[request.param]
    theirs = tiny.make(head_dim=head_dim, heads=heads, kv_heads=kv_heads)
    folder = tiny.save(theirs, tmp_path_factory.mktemp("granite"), sharded=kv_heads == 2)
    return theirs, GraniteForCausalLM.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, GraniteForCausalLM]:
    theirs = tiny.make()
    return theirs, GraniteForCausalLM.from_pretrained(tiny.save(theirs, tmp_path_factory.mktemp("one")), device="cpu")


def logits_of(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def test_logits_equal_transformers_at_every_position(pair: tuple[Any, GraniteForCausalLM]) -> None:
    theirs, ours = pair
    ids = tiny.prompts(2, 37)
    assert tiny.spread_error(logits_of(ours, ids), logits_of(theirs, ids)) < 1e-4


def test_prefill_then_decode_equals_prefill(pair: tuple[Any, GraniteForCausalLM]) -> None:
    _, ours = pair
    ids = tiny.prompts(2, 24)
    whole = logits_of(ours, ids)
    out = ours(ids[:, :17])
    parts = [out.logits]
    for index in range(17, 24):
        out = ours(ids[:, index : index + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    assert tiny.spread_error(torch.cat(parts, 1), whole) < 1e-4


def test_left_padded_batch_equals_its_rows_alone(pair: tuple[Any, GraniteForCausalLM]) -> None:
    theirs, ours = pair
    ids = tiny.prompts(3, 20)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 12)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    batch = logits_of(ours, ids, attention_mask=mask)
    for row, padding in enumerate((0, 5, 12)):
        alone = logits_of(ours, ids[row : row + 1, padding:])
        assert tiny.spread_error(batch[row : row + 1, padding:], alone) < 1e-4
        assert tiny.spread_error(alone, logits_of(theirs, ids[row : row + 1, padding:])) < 1e-4


def test_greedy_tokens_equal_transformers(pair: tuple[Any, GraniteForCausalLM]) -> None:
    theirs, ours = pair
    ids = tiny.prompts(3, 11)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=40)[:, : expected.shape[1]], expected)


def test_repetition_penalty_equals_transformers(one: tuple[Any, GraniteForCausalLM]) -> None:
    theirs, ours = one
    ids = tiny.prompts(1, 9)
    expected = theirs.generate(ids, max_new_tokens=32, do_sample=False, repetition_penalty=1.7)
    assert torch.equal(ours.generate(ids, max_new_tokens=32, repetition_penalty=1.7), expected)


def test_untied_head_and_llama(tmp_path: Path) -> None:
    theirs = tiny.make("llama", tie_word_embeddings=False, kv_heads=2)
    ours = GraniteForCausalLM.from_pretrained(tiny.save(theirs, tmp_path), device="cpu")
    ids = tiny.prompts(2, 19)
    assert tiny.spread_error(logits_of(ours, ids), logits_of(theirs, ids)) < 1e-4


@pytest.mark.parametrize("kind", ["granitemoe", "granitemoeshared"])
def test_mixture_of_experts_equals_transformers(kind: str, tmp_path: Path) -> None:
    shared = {"shared_intermediate_size": 96} if kind == "granitemoeshared" else {}
    theirs = tiny.make(kind, heads=6, kv_heads=2, num_local_experts=10, num_experts_per_tok=4, **shared)
    ours = GraniteForCausalLM.from_pretrained(tiny.save(theirs, tmp_path), device="cpu")
    ids = tiny.prompts(3, 13)
    assert tiny.spread_error(logits_of(ours, ids), logits_of(theirs, ids)) < 1e-4
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=12)[:, : expected.shape[1]], expected)


def test_bfloat16_is_no_worse_than_transformers(tmp_path: Path) -> None:
    theirs = tiny.make()
    ids = tiny.prompts(2, 21)
    exact = logits_of(theirs.double(), ids)
    folder = tiny.save(theirs.float(), tmp_path)
    ours = GraniteForCausalLM.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    eager = logits_of(theirs.to(torch.bfloat16), ids)
    error, allowed = ((x.double() - exact).pow(2).mean().sqrt().item() for x in (logits_of(ours, ids), eager))
    assert error <= 1.1 * allowed


def test_a_prompt_in_chunks_gives_the_same_tokens(one: tuple[Any, GraniteForCausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = one
    ids = tiny.prompts(2, 50)
    expected, whole = ours.generate(ids, max_new_tokens=8), logits_of(ours, ids)
    monkeypatch.setitem(generation.CHUNK, "cpu", 16)
    assert torch.equal(ours.generate(ids, max_new_tokens=8), expected)
    assert tiny.spread_error(logits_of(ours, ids), whole) < 1e-5
    assert tiny.spread_error(logits_of(ours, ids, logits_to_keep=20), whole[:, -20:]) < 1e-5


def test_logits_to_keep(one: tuple[Any, GraniteForCausalLM]) -> None:
    _, ours = one
    ids = tiny.prompts(2, 12)
    kept = logits_of(ours, ids, logits_to_keep=3)
    assert kept.shape == (2, 3, tiny.VOCAB)
    assert tiny.spread_error(kept, logits_of(ours, ids)[:, -3:]) < 1e-5


def test_caches_belong_to_their_callers(one: tuple[Any, GraniteForCausalLM]) -> None:
    _, ours = one
    a, b, c = tiny.prompts(1, 10, seed=3), tiny.prompts(1, 14, seed=4), tiny.prompts(1, 1, seed=5)
    first, second = ours(a), ours(b)
    ours.generate(tiny.prompts(1, 30), max_new_tokens=4)
    for ids, out in ((a, first), (b, second)):
        joined = logits_of(ours, torch.cat((ids, c), 1))[:, -1:]
        assert tiny.spread_error(logits_of(ours, c, past_key_values=out.past_key_values), joined) < 1e-4


def test_position_ids_are_honoured(one: tuple[Any, GraniteForCausalLM]) -> None:
    theirs, ours = one
    ids = tiny.prompts(1, 8)
    positions = torch.tensor([[3, 4, 9, 10, 11, 40, 41, 99]])
    expected = logits_of(theirs, ids, position_ids=positions)
    assert tiny.spread_error(logits_of(ours, ids, position_ids=positions), expected) < 1e-4
    assert tiny.spread_error(logits_of(ours, ids), expected) > 1e-3


def test_generation_ends_at_the_end_token_of_each_row(one: tuple[Any, GraniteForCausalLM]) -> None:
    _, ours = one
    ids = tiny.prompts(3, 7)
    free = ours.generate(ids, max_new_tokens=20, eos_token_id=[])
    end = int(free[1, 7 + 4])  # the second row ends at its fifth new token, or earlier
    out = ours.generate(ids, max_new_tokens=20, eos_token_id=end)
    for row in range(3):
        new, expected = out[row, 7:].tolist(), free[row, 7:].tolist()
        stop = expected.index(end) + 1 if end in expected else 20
        assert new[:stop] == expected[:stop]
        assert set(new[stop:]) <= {0}


def test_sampling_is_reproducible_and_bounded(one: tuple[Any, GraniteForCausalLM]) -> None:
    _, ours = one
    ids = tiny.prompts(2, 7)
    sampled = [ours.generate(ids, max_new_tokens=12, do_sample=True, temperature=1.5, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    greedy = ours.generate(ids, max_new_tokens=12)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=True, top_k=1), greedy)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=True, top_p=1e-6), greedy)
    torch.manual_seed(3)
    first = ours.generate(ids, max_new_tokens=12, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=True), first)


def test_streamer_gets_the_prompt_and_every_token(one: tuple[Any, GraniteForCausalLM]) -> None:
    _, ours = one

    class Streamer:
        def __init__(self) -> None:
            self.values: list[torch.Tensor] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.values.append(value.flatten())

        def end(self) -> None:
            self.ended = True

    streamer, ids = Streamer(), tiny.prompts(1, 6)
    out = ours.generate(ids, max_new_tokens=5, streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.values), out[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "prompt is empty"),
        ({"input_ids": []}, "prompt is empty"),
        ({"input_ids": torch.tensor([[1, tiny.VOCAB]])}, "outside the vocabulary"),
        ({"input_ids": torch.tensor([[1, -1]])}, "token id -1 is outside"),
        ({"input_ids": torch.ones(1, 3)}, "expected integers"),
        ({"input_ids": [[1, 2], [1, 2, 3]]}, "pad them on the left"),
        ({"input_ids": torch.tensor([[0, 1], [2, 3]])}, "pass attention_mask"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padded on the left only"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask has shape"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2046}, "need a context of 2049, the model has 2048"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"do_sample": True, "top_p": 0.0}, "top_p is 0.0"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop": ["x"]}, "need a tokenizer"),
    ],
)
def test_bad_requests_are_refused(one: tuple[Any, GraniteForCausalLM], arguments: dict[str, Any], message: str) -> None:
    _, ours = one
    with pytest.raises(GraniteError, match=message):
        ours.generate(**{"input_ids": torch.tensor([[1, 2, 3]]), **arguments})


def test_one_request_at_a_time(one: tuple[Any, GraniteForCausalLM]) -> None:
    _, ours = one
    request = ours._request(torch.tensor([[1, 2]]))
    steps = ours._run(request)
    next(steps)
    with pytest.raises(GraniteError, match="one request at a time"):
        ours.generate(torch.tensor([[1, 2]]), max_new_tokens=1)
    steps.close()
    assert ours.generate(torch.tensor([[1, 2]]), max_new_tokens=1).shape == (1, 3)


def test_it_is_a_module(one: tuple[Any, GraniteForCausalLM], tmp_path: Path) -> None:
    theirs, _ = one
    ours = GraniteForCausalLM.from_pretrained(tiny.save(theirs, tmp_path), device="cpu").eval()
    assert sum(parameter.numel() for parameter in ours.parameters()) == theirs.num_parameters()
    assert (ours.device, ours.dtype) == (torch.device("cpu"), torch.float32)
    expected = logits_of(ours, tiny.prompts(1, 5))
    assert tiny.spread_error(logits_of(ours.to(torch.float64), tiny.prompts(1, 5)).float(), expected) < 1e-5
    assert ours.dtype == torch.float64
    assert ours.to(torch.bfloat16).generate(tiny.prompts(1, 5), max_new_tokens=3).shape == (1, 8)


def test_memory_counts_each_tensor_once(one: tuple[Any, GraniteForCausalLM]) -> None:
    theirs, ours = one
    memory = ours.memory()
    assert memory.weights == 4 * theirs.num_parameters()
    assert memory.bits_per_weight == 32
    assert memory.total == memory.weights + memory.cache + memory.workspace
    assert "bits per weight" in str(memory)


def test_kernels_name_every_role(one: tuple[Any, GraniteForCausalLM]) -> None:
    _, ours = one
    rows = ours.kernels()
    assert {"attention", "sample_step", "norm_qkv_rope_append"} <= {row.role for row in rows}
    assert all(row.active is False and row.reason for row in rows)
    assert "reference.attention.attention" in str(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cuda", "device_map": "auto"}, "other spelling"),
        ({"load_in_8bit": True}, "doesn't take 'load_in_8bit'"),
        ({"max_context": 4096}, "max_context is 4096, expected 1 to 2048"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, one: tuple[Any, GraniteForCausalLM], tmp_path: Path) -> None:
    tiny.save(one[0], tmp_path)
    with pytest.raises(GraniteError, match=message):
        GraniteForCausalLM.from_pretrained(tmp_path, **options)


def test_transformers_spellings(one: tuple[Any, GraniteForCausalLM], tmp_path: Path) -> None:
    ours = GraniteForCausalLM.from_pretrained(tiny.save(one[0], tmp_path), torch_dtype=torch.bfloat16, device_map="cpu")
    assert ours.dtype == torch.bfloat16


def test_max_context_is_a_limit(one: tuple[Any, GraniteForCausalLM], tmp_path: Path) -> None:
    ours = GraniteForCausalLM.from_pretrained(tiny.save(one[0], tmp_path), device="cpu", max_context=16)
    with pytest.raises(GraniteError, match="the model has 16"):
        ours.generate(tiny.prompts(1, 10), max_new_tokens=7)
    assert ours.generate(tiny.prompts(1, 10), max_new_tokens=6, eos_token_id=[]).shape == (1, 16)


def test_what_does_not_fit_is_refused_before_it_is_allocated(
    one: tuple[Any, GraniteForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(one[0], tmp_path)
    size = 4 * one[0].num_parameters()
    monkeypatch.setattr(room, "available", lambda device: size)
    with pytest.raises(GraniteError, match=r"weights take 0.00 GB in float32, .* dtype=torch.bfloat16 would fit"):
        GraniteForCausalLM.from_pretrained(folder, device="cpu")
    ours = GraniteForCausalLM.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    monkeypatch.setattr(room, "available", lambda device: 100 * ours.config.cache_bytes_per_token(torch.bfloat16))
    with pytest.raises(GraniteError, match=r"cache of 210 tokens for a batch of 1 .* 95 tokens would fit"):
        ours.generate(tiny.prompts(1, 10), max_new_tokens=200)
    assert ours.memory().cache == 0
    assert ours.generate(tiny.prompts(1, 10), max_new_tokens=4).shape[0] == 1


def test_from_config_makes_the_same_model_from_a_seed() -> None:
    from granite_kernels import GraniteConfig

    config = GraniteConfig.from_dict(
        {"architectures": ["GraniteForCausalLM"], "model_type": "granite", **tiny.granite_config()}, source="test"
    )
    ids = tiny.prompts(1, 6)
    one, two, other = (
        logits_of(GraniteForCausalLM.from_config(config, seed=seed, dtype=torch.float32, device="cpu"), ids) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
