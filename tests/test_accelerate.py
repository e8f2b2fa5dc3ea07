"""accelerate: the same tokens from the same model, on kernels; and nothing of it, or of another model, is changed."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import granite_kernels
from granite_kernels.errors import GraniteError
from granite_kernels.testing import assert_accurate
from tests import tiny, tiny_hf

CACHES = ("dynamic", "static")


@pytest.fixture(autouse=True)
def said() -> Iterator[None]:
    """What accelerate warns of on a CPU is the subject of one test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* runs on .*: .*")
        yield


def tokens(model: Any, new: int, cache: str = "dynamic", **options: Any) -> torch.Tensor:
    """Greedy tokens of a batch with left padding."""
    prompts = tiny_hf.padded_prompts(2, 9)
    return model.generate(**prompts, max_new_tokens=new, do_sample=False, eos_token_id=None, cache_implementation=cache, **options)


def files(model: Any, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def instance_state(model: Any) -> list[set[str]]:
    return [set(module.__dict__) for module in model.modules()]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", tiny_hf.KINDS)
def test_tokens_are_identical_in_plain_pytorch(kind: str, cache: str) -> None:
    model = tiny_hf.make(kind)
    expected = tokens(model, 64, cache)
    assert len(set(expected[0, 9:].tolist())) > 32
    assert granite_kernels.accelerate(model, backend="torch") is model
    assert torch.equal(tokens(model, 64, cache), expected)


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "temperature": 0.8, "top_k": 30},
        {"repetition_penalty": 1.3},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_every_mode_of_their_generate_gives_the_same_tokens(mode: dict[str, Any]) -> None:
    model, ids, found = tiny_hf.make(), tiny.prompts(1, 4).repeat(1, 3), []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(model.generate(ids, max_new_tokens=20, eos_token_id=None, **{"do_sample": False, **mode}))
        granite_kernels.accelerate(model, backend="torch")
    assert torch.equal(*found)


@pytest.mark.parametrize("cache", CACHES)
def test_assisted_decoding_criteria_and_streamers_see_the_same(cache: str) -> None:
    from transformers import StoppingCriteriaList, TextStreamer

    model, ids, sent = tiny_hf.make(), tiny.prompts(1, 9), []
    assistant = tiny_hf.near(model)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    sixth = int(model.generate(ids, **options)[0, 14])

    class Kept(TextStreamer):  # type: ignore[misc]  # transformers is untyped to mypy
        def put(self, value: torch.Tensor) -> None:
            sent[-1] += value.flatten().tolist()

        def end(self) -> None:
            sent[-1].append(-1)

    def generate() -> list[torch.Tensor]:
        sent.append([])
        stop = StoppingCriteriaList([lambda input_ids, scores, **_: input_ids[:, -1] == sixth])
        streamer = Kept(tiny_hf.tokenizer())
        texts = [model.generate(ids, stopping_criteria=stop, streamer=streamer, cache_implementation=cache, **options)]
        if cache == "dynamic":  # not all releases of transformers 5 take another for drafts
            texts += [model.generate(ids, assistant_model=assistant, **options), assistant.generate(ids, assistant_model=model, **options)]
        return texts

    before = generate()
    granite_kernels.accelerate(model, backend="torch")
    assert all(map(torch.equal, generate(), before))
    assert sent[0] == sent[1] == [*before[0][0].tolist(), -1]
    assert before[0].shape[1] < 9 + 24


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["granite", "granitemoe", "llama"])
def test_tokens_are_identical_in_triton(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hf.large_tiles(monkeypatch)
    model = tiny_hf.make_small(kind)
    expected = [tokens(model, 16, cache) for cache in CACHES]
    granite_kernels.accelerate(model, backend="triton", strict=True)
    assert all(row.active for row in granite_kernels.status(model)[:-1])
    for cache, before in zip(CACHES, expected, strict=True):
        assert torch.equal(tokens(model, 16, cache), before)


def logits(model: Any, **options: Any) -> torch.Tensor:
    """At the real positions of a batch with left padding: in the prompt and one step behind it."""
    prompts = tiny_hf.padded_prompts(2, 9) | options
    mask = prompts["attention_mask"]
    with torch.no_grad():
        first = model(**prompts, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
        longer, positions = torch.cat((mask, torch.ones_like(mask[:, :1])), 1), mask.sum(1, keepdim=True)
        step = model(prompts["input_ids"][:, -1:], attention_mask=longer, position_ids=positions, past_key_values=first.past_key_values)
    return torch.cat((first.logits[mask.bool()], step.logits[:, 0]))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("granite", "torch"), ("granite", "triton"), ("granitemoe", "torch"), ("granitemoe", "triton"), ("llama", "triton")],
)
def test_bfloat16_logits_keep_the_accuracy_rule(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hf.large_tiles(monkeypatch)
    model = tiny_hf.make_small(kind) if backend == "triton" else tiny_hf.make(kind)
    model.to(torch.bfloat16)
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # the others take no float64
    exact, eager = logits(wide), logits(model)
    granite_kernels.accelerate(model, backend=backend)
    assert_accurate(logits(model), exact, eager)


# ------------------------------------------------------------------ what stays as it is


def test_the_model_is_the_same_object_with_the_same_bytes(tmp_path: Path) -> None:
    model, plain = tiny_hf.make(), tiny_hf.make(seed=1)
    before, saved, instances = dict(model.state_dict()), files(model, tmp_path / "before"), instance_state(model)
    pointers, others, expected = [p.data_ptr() for p in model.parameters()], instance_state(plain), logits(plain)
    kind, functions = type(model), {module: type(module).forward for module in model.modules()}
    granite_kernels.accelerate(model, backend="torch")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert type(model) is kind
    assert files(model, tmp_path / "after") == saved
    tokens(model, 2)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert instance_state(plain) == others
    assert torch.equal(logits(plain), expected)
    assert all(type(module).forward is forward for module, forward in functions.items())
    assert granite_kernels.restore(model) is model
    assert instance_state(model) == instances


def test_accelerating_again_replaces_the_first_time() -> None:
    model = tiny_hf.make()
    instances = instance_state(model)
    granite_kernels.accelerate(granite_kernels.accelerate(model), backend="torch")
    assert {row.reason for row in granite_kernels.status(model)[:-1]} == {"asked for"}
    assert instance_state(granite_kernels.restore(granite_kernels.restore(model))) == instances


def test_another_librarys_forward_is_called_and_put_back() -> None:
    model = tiny_hf.make()
    calls: list[str] = []
    layer = model.model.layers[1]
    hooked = {"norm": model.model.norm, "mlp": layer.mlp, "q": layer.self_attn.q_proj, "layer": model.model.layers[0]}
    for name, module in hooked.items():

        def forward(*arguments: Any, stock: Any = module.forward, name: str = name, **keywords: Any) -> Any:
            calls.append(name)
            return stock(*arguments, **keywords)

        module.forward = forward
    theirs = {name: module.__dict__["forward"] for name, module in hooked.items()}
    expected = logits(model)
    calls.clear()
    granite_kernels.accelerate(model, backend="torch")
    assert tiny.spread_error(logits(model), expected) < 1e-5
    assert sorted(calls) == sorted([*hooked, *hooked])  # once in the prompt, once in the step
    granite_kernels.restore(model)
    assert {name: module.__dict__["forward"] for name, module in hooked.items()} == theirs
    with pytest.raises(GraniteError, match=r"model\.layers\.0\..* can't be accelerated: another library's forward"):
        granite_kernels.accelerate(model, backend="torch", strict=True)
    assert {name: module.__dict__["forward"] for name, module in hooked.items()} == theirs


def test_a_wrapper_put_over_ours_survives_restoring() -> None:
    model = tiny_hf.make()
    expected = logits(model)
    granite_kernels.accelerate(model, backend="torch")
    layer = model.model.layers[0]
    ours = layer.forward
    layer.forward = lambda *arguments, **keywords: ours(*arguments, **keywords)
    wrapper = layer.forward
    granite_kernels.restore(model)
    assert layer.forward is wrapper
    assert torch.equal(logits(model), expected)


def test_forward_hooks_and_recorded_outputs_work() -> None:
    model = tiny_hf.make("granitemoe")
    options = {"output_hidden_states": True, "output_router_logits": True, "output_attentions": True}
    ids = tiny.prompts(1, 7)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, **options)
        granite_kernels.accelerate(model, backend="torch")
        found, again = model(ids, **options), model(ids)
    for name in ("hidden_states", "router_logits", "attentions"):
        assert len(found[name]) == len(expected[name])
        assert all(tiny.spread_error(a, b) < 1e-5 for a, b in zip(found[name], expected[name], strict=True))
    assert tiny.spread_error(again.logits, expected.logits) < 1e-5
    assert not any("hooks" in row.reason for row in granite_kernels.status(model))  # theirs are idle now
    seen: list[Any] = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: seen.append(1))
    model(ids)
    with torch.no_grad():
        model(ids)
    assert len(seen) == 2
    assert any("hooks are registered" in row.reason for row in granite_kernels.status(model))
    handle.remove()


def test_a_deepcopy_is_accelerated_over_its_own_weights() -> None:
    model = tiny_hf.make()
    granite_kernels.accelerate(model, backend="torch")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert list(granite_kernels.status(twin)) == list(granite_kernels.status(model))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    accelerated = logits(twin)
    assert tiny.spread_error(accelerated, logits(granite_kernels.restore(twin))) < 1e-5
    assert granite_kernels.status(model)[0].kernel != "transformers"


def test_pickling_gives_a_working_stock_model() -> None:
    model = tiny_hf.make()
    expected = logits(model)
    granite_kernels.accelerate(model, backend="torch")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"granite_kernels" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(loaded), expected)
    assert granite_kernels.status(loaded)[0].reason == "accelerate was not called, or restore was"
    granite_kernels.accelerate(loaded, backend="torch", strict=True)
    assert tiny.spread_error(logits(loaded), expected) < 1e-5
    assert torch.equal(logits(granite_kernels.restore(loaded)), expected)


def test_later_edits_and_moves_are_seen() -> None:
    model = tiny_hf.make()
    granite_kernels.accelerate(model, backend="torch")
    logits(model)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.k_proj.weight.mul_(-1)  # in place
        layer.mlp.up_proj.weight = torch.nn.Parameter(-layer.mlp.up_proj.weight)  # another parameter
    found = logits(model)
    assert tiny.spread_error(found, logits(granite_kernels.restore(copy.deepcopy(model)))) < 1e-5
    halved = logits(model.to(torch.bfloat16))
    assert halved.dtype == torch.bfloat16
    assert tiny.spread_error(halved.float(), found) < 0.1
