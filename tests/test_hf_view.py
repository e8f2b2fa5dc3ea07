"""Our model in the places of transformers' own: each mode of generation gives the tokens that theirs gives."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from granite_kernels import GraniteForCausalLM
from granite_kernels.errors import GraniteError
from tests import tiny, tiny_hf

NEW = 24


@pytest.fixture(scope="module", params=["granite", "granitemoe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    theirs = tiny_hf.make(request.param)
    folder = tiny.save(theirs, tmp_path_factory.mktemp("view"))
    return theirs, GraniteForCausalLM.from_pretrained(folder, device="cpu").as_transformers()


def both(pair: tuple[Any, Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """What both models generate, from the same state of torch's generator."""
    found = []
    for model in pair:
        torch.manual_seed(7)
        found.append(model.generate(*arguments, max_new_tokens=NEW, **{"eos_token_id": None, "do_sample": False, **options}))
    return found[0], found[1]


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "sampled beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "without a cache": {"use_cache": False},
    "prompt in chunks": {"prefill_chunk_size": 4},
    "penalty": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", list(MODES))
def test_tokens_of_a_mode_equal_transformers(pair: tuple[Any, Any], mode: str) -> None:
    ids = tiny.prompts(1, 4).repeat(1, 3)  # a prompt with repetitions, so that looking up finds some
    theirs, ours = both(pair, ids, **MODES[mode])
    assert torch.equal(ours, theirs)
    assert len(set(ours[0].tolist())) > NEW // 2  # text that repeats itself would be equal whatever the cache held


@pytest.mark.parametrize("mode", ["greedy", "beams", "sampled"])
def test_left_padded_batches_equal_transformers(pair: tuple[Any, Any], mode: str) -> None:
    theirs, ours = both(pair, **tiny_hf.padded_prompts(3, 10), **MODES[mode])
    assert torch.equal(ours, theirs)


def test_assisted_decoding_equals_transformers(pair: tuple[Any, Any]) -> None:
    assistant, ids = tiny_hf.near(pair[0]), tiny.prompts(1, 9)
    greedy, _ = both(pair, ids)
    for sample in (False, True):
        theirs, ours = both(pair, ids, assistant_model=assistant, do_sample=sample)
        assert torch.equal(ours, theirs)
        assert sample or torch.equal(ours, greedy)
    assisting = pair[0].generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, assistant_model=pair[1])
    assert torch.equal(assisting, greedy)  # and ours assists theirs


def test_stopping_criteria_end_the_text_where_transformers_does(pair: tuple[Any, Any]) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    ids = tiny.prompts(1, 9)
    free, _ = both(pair, ids)
    sixth = int(free[0, ids.shape[1] + 5])

    class AtToken(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped to mypy
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids[:, -1] == sixth

    theirs, ours = both(pair, ids, stopping_criteria=StoppingCriteriaList([AtToken()]))
    assert torch.equal(ours, theirs)
    assert ours.shape[1] < free.shape[1]
    theirs, ours = both(pair, ids, eos_token_id=sixth)
    assert torch.equal(ours, theirs)


def test_scores_and_a_kept_cache_are_handed_back(pair: tuple[Any, Any]) -> None:
    ids = tiny.prompts(1, 9)
    theirs, ours = both(pair, ids, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert tiny.spread_error(torch.stack(ours.logits), torch.stack(theirs.logits)) < 1e-4
    longer = torch.cat((ours.sequences, ids), dim=1)
    resumed = pair[1].generate(longer, past_key_values=ours.past_key_values, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(resumed, pair[0].generate(longer, max_new_tokens=5, do_sample=False, eos_token_id=None))


def test_streamers_receive_what_transformers_sends(pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextIteratorStreamer, TextStreamer

    ids, tokenizer = tiny.prompts(1, 9), tiny_hf.tokenizer()
    printed = []
    for model in pair:
        model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, streamer=TextStreamer(tokenizer))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "streamer": streamer}
    thread = threading.Thread(target=pair[1].generate, args=(ids,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == printed[0].split()[-6:]


def test_pipeline_plain_and_chat_equal_transformers(pair: tuple[Any, Any]) -> None:
    from transformers import pipeline

    inputs = ["w5 w6 w7", ["w9 w10", "w11"], [{"role": "user", "content": "w20 w21"}]]
    answers = []
    for model in pair:
        pipe = pipeline("text-generation", model=model, tokenizer=tiny_hf.tokenizer(), device="cpu")
        answers.append([pipe(text, max_new_tokens=8, do_sample=False) for text in inputs])
    assert answers[0] == answers[1]
    assert answers[1][2][0]["generated_text"][-1]["role"] == "assistant"


def test_logits_equal_transformers_and_right_padding_does_no_harm(pair: tuple[Any, Any]) -> None:
    ids = torch.cat((tiny.prompts(2, 11), torch.zeros(2, 3, dtype=torch.int64)), dim=1)  # as lm-eval pads
    with torch.no_grad():
        theirs, ours = (model(ids).logits for model in pair)
    assert tiny.spread_error(ours[:, :11], theirs[:, :11]) < 1e-4


def test_it_is_a_view_without_a_copy(pair: tuple[Any, Any]) -> None:
    view = pair[1]
    assert view.engine.as_transformers().engine is view.engine
    assert {p.data_ptr() for p in view.parameters()} == {p.data_ptr() for p in view.engine.parameters()}
    assert view.config.model_type == pair[0].config.model_type
    assert view.to("cpu") is view
    assert (view.device, view.dtype, view.can_generate()) == (torch.device("cpu"), torch.float32, True)


def test_what_the_view_does_not_give_is_refused(pair: tuple[Any, Any]) -> None:
    from transformers import DynamicCache

    view, ids = pair[1], tiny.prompts(1, 5)
    for options, message in (
        ({"output_attentions": True}, "doesn't take output_attentions"),
        ({"labels": ids}, "doesn't take labels"),
        ({"past_key_values": DynamicCache()}, "is a DynamicCache"),
    ):
        with pytest.raises(GraniteError, match=message):
            view(ids, **options)
    with pytest.raises(GraniteError, match="cache_implementation is 'offloaded'"):
        view.generate(ids, max_new_tokens=2, cache_implementation="offloaded")
