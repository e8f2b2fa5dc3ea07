"""generate(custom_generate=fast_decode): transformers' generate with our decode loop gives transformers' tokens."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from typing import Any

import pytest
import torch
from granite_kernels.model.hf import decode

import granite_kernels
from granite_kernels.errors import GraniteError
from tests import tiny, tiny_hf

NEW = 24
IDS = tiny.prompts(1, 9)


@pytest.fixture(scope="module", params=["granite", "granitemoe"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_hf.make(request.param)


def both(model: Any, *arguments: Any, ours: Any = None, **options: Any) -> tuple[Any, Any]:
    """What transformers' loop generates, and what ours does, from the same state of torch's generator."""
    given = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False, **options}
    torch.manual_seed(3)
    theirs = model.generate(*arguments, **given)
    torch.manual_seed(3)
    return theirs, (ours or model).generate(*arguments, custom_generate=granite_kernels.fast_decode, **given)


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9},
    "min_p": {"do_sample": True, "min_p": 0.05, "typical_p": 0.95},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 10},
    "bad words": {"bad_words_ids": [[7], [11, 12]], "suppress_tokens": [3, 5]},
}


@pytest.mark.parametrize("mode", list(MODES))
def test_tokens_of_a_mode_equal_transformers(model: Any, mode: str) -> None:
    theirs, ours = both(model, IDS, **MODES[mode])
    assert torch.equal(ours, theirs)
    assert len(set(ours[0].tolist())) > NEW // 2


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_padded_batches_whose_rows_end_apart_equal_transformers(model: Any, mode: str) -> None:
    prompts = tiny_hf.padded_prompts(3, 10)
    free, _ = both(model, **prompts, **MODES[mode])
    ends = [int(free[0, 10 + 4]), int(free[1, 10 + 9]), int(free[2, 10 + 15])]
    theirs, ours = both(model, **prompts, **MODES[mode], eos_token_id=ends, pad_token_id=2)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] < free.shape[1]
    assert (ours[0] == 2).any()


def test_an_engine_is_kept_until_the_model_changes(model: Any) -> None:
    both(model, IDS)
    kept = decode.ENGINES[model][1]
    both(model, IDS)
    assert decode.ENGINES[model][1] is kept
    twin = copy.deepcopy(model)
    twin.generate(IDS, max_new_tokens=2, custom_generate=granite_kernels.fast_decode)
    with torch.no_grad():
        twin.model.norm.weight = torch.nn.Parameter(-twin.model.norm.weight)
    theirs, ours = both(twin, IDS)
    assert torch.equal(ours, theirs)
    assert twin in decode.ENGINES
    held = len(decode.ENGINES)
    del twin
    gc.collect()
    assert len(decode.ENGINES) == held - 1


def test_accelerated_models_and_views_decode_fast_too(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerated = granite_kernels.accelerate(copy.deepcopy(model), backend="torch")
    view = granite_kernels.GraniteForCausalLM.from_transformers(model).as_transformers()
    for other in (accelerated, view):
        theirs, ours = both(model, IDS, ours=other, **MODES["penalties"])
        assert torch.equal(ours, theirs)
    assert decode.ENGINES[accelerated][1].backend == "torch"


def test_stopping_criteria_and_scores_equal_transformers(model: Any) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Long(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped to mypy
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 17)

    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    theirs, ours = both(model, IDS, stopping_criteria=StoppingCriteriaList([Long()]), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.sequences.shape[1] == 17
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(theirs[name])
        assert tiny.spread_error(torch.stack(ours[name]), torch.stack(theirs[name])) < 1e-4


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}])
def test_streamers_receive_every_token_and_the_end(model: Any, options: dict[str, Any]) -> None:
    from transformers import TextIteratorStreamer

    expected, _ = both(model, IDS, **options)
    tokenizer = tiny_hf.tokenizer()
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    given = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False, "streamer": streamer, **options}
    work = threading.Thread(target=model.generate, args=(IDS,), kwargs=given | {"custom_generate": granite_kernels.fast_decode})
    work.start()
    text = "".join(streamer)
    work.join()
    assert text.split() == tokenizer.decode(expected[0]).split()


def test_kernels_decode_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hf.large_tiles(monkeypatch)
    model = tiny_hf.make_small()
    modes = ({}, MODES["bad words"])
    given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = [model.generate(IDS, **given, **more) for more in modes]
    granite_kernels.accelerate(model, backend="triton")
    found = [model.generate(IDS, **given, **more, custom_generate=granite_kernels.fast_decode) for more in modes]
    assert torch.equal(torch.cat(found), torch.cat(expected))
    assert all(row.active for row in decode.ENGINES[model][1].kernels())


def test_what_the_loop_does_not_do_is_refused(model: Any) -> None:
    from transformers import DynamicCache

    for options, message in (
        ({"num_beams": 2}, "beam search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"assistant_model": model}, "assisted generation"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
    ):
        with pytest.raises(GraniteError, match=f"fast_decode doesn't do {message}"):
            model.generate(IDS, max_new_tokens=2, custom_generate=granite_kernels.fast_decode, **options)
    cache = DynamicCache(config=model.config)
    model.generate(IDS, max_new_tokens=2, past_key_values=cache)
    with pytest.raises(GraniteError, match="holds tokens already"):
        model.generate(tiny.prompts(1, 14), max_new_tokens=2, past_key_values=cache, custom_generate=granite_kernels.fast_decode)
    hooked = copy.deepcopy(model)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(GraniteError, match="lm_head can't be shared: hooks are registered"):
        hooked.generate(IDS, max_new_tokens=2, custom_generate=granite_kernels.fast_decode)
