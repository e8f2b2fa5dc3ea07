"""Our decode loop in transformers' generate, which hands a callable its processors and criteria ready-made.

Greedy decoding that nothing but end tokens and a length limits is our own loop: the choice happens in the captured step, and
tokens are read every few steps. All else runs the captured step up to the logits and leaves the choice to transformers' processors
and torch's generator, so that seeds mean what they mean there.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from granite_kernels.errors import GraniteError

from ..drive import drive
from ..model import GraniteForCausalLM as Engine
from ..request import Request, make_request
from .layer import Forward
from .models import CACHE, causal_lm, why_not_shared
from .view import GraniteForCausalLM as View

USED = ("attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "tokenizer", "input_ids")
CALLERS = 6  # frames between generate and whoever asks here
ENGINES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Engine]] = weakref.WeakKeyDictionary()  # model: (its parameters, engine)


def engine_of(model: Any) -> Engine:
    """The engine of a view, or one over the weights of a transformers model; kept while the model lives and has these parameters."""
    if isinstance(model, View):
        return model.engine
    lm = causal_lm(model)
    reason = why_not_shared(lm)
    if reason is not None:
        raise GraniteError(reason)
    key = [(parameter.data_ptr(), parameter.dtype) for parameter in lm.parameters()]
    kept = ENGINES.get(lm)
    if kept is None or kept[0] != key:
        forward = lm.model.norm.__dict__.get("forward")
        backend = forward.session.backend if isinstance(forward, Forward) else "auto"
        kept = ENGINES[lm] = (key, Engine.from_transformers(lm, backend=backend))
    return kept[1]


def fast_decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Any:
    streamer = streamer if streamer is not None else _of_generate("streamer")
    _check(generation_config, model_kwargs)
    engine = engine_of(model)
    request = make_request(
        engine.config,
        engine.device,
        input_ids,
        limit=engine.max_context,
        attention_mask=_mask(input_ids, model_kwargs),
        max_new_tokens=stopping_criteria.max_length - input_ids.shape[1],
        eos_token_id=_end_tokens(stopping_criteria),
        seed=0,  # unused: one that is drawn would move torch's generator, which their sampling draws from
    )
    kinds = {type(criterion) for criterion in stopping_criteria}
    plain = not generation_config.do_sample and not logits_processor and not generation_config.return_dict_in_generate
    if plain and kinds <= {MaxLengthCriteria, EosTokenCriteria}:
        return _greedy(engine, request, input_ids, generation_config._pad_token_tensor, streamer)
    return _chosen(engine, request, input_ids, logits_processor, stopping_criteria, generation_config, streamer)


def _greedy(engine: Engine, request: Request, ids: Tensor, pad: Tensor | None, streamer: Any) -> Tensor:
    fill = int(pad) if pad is not None else request.pad
    rows: list[list[int]] = []
    with contextlib.closing(engine._run(request)) as steps:
        for tokens in steps:
            rows.append([fill if token is None else token for token in tokens])
            if streamer is not None:
                streamer.put(torch.tensor(rows[-1]))
    if streamer is not None:
        streamer.end()
    return torch.cat((ids, torch.tensor(rows, dtype=ids.dtype, device=ids.device).T), dim=1)


def _chosen(engine: Engine, request: Request, ids: Tensor, processor: Any, criteria: Any, config: Any, streamer: Any) -> Any:
    """Step for step: their processors, torch's generator, their criteria."""
    ends, pad = any(hasattr(criterion, "eos_token_id") for criterion in criteria), config._pad_token_tensor
    keep_scores = config.return_dict_in_generate and config.output_scores
    keep_logits = config.return_dict_in_generate and config.output_logits
    all_scores: list[Tensor] = []
    all_logits: list[Tensor] = []
    live = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    with contextlib.closing(drive(engine, request)) as steps:
        logits = next(steps)
        while True:
            logits = logits.to(ids.device, torch.float32, copy=True)
            scores = processor(ids, logits)
            if keep_scores:
                all_scores.append(scores)
            if keep_logits:
                all_logits.append(logits)
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            if ends and pad is not None:
                tokens = torch.where(live, tokens, pad.to(ids.device))
            ids = torch.cat((ids, tokens[:, None]), dim=1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            live &= ~criteria(ids, tuple(all_scores) if keep_scores else None)
            if not bool(live.any()):
                break
            logits = steps.send(tokens.to(engine.device))
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return ids
    kept = dict(scores=tuple(all_scores) if keep_scores else None, logits=tuple(all_logits) if keep_logits else None)
    return GenerateDecoderOnlyOutput(sequences=ids, **kept)


# ------------------------------------------------------------------ what generate hands over


def _of_generate(name: str) -> Any:
    """The argument `name` of the `generate` that calls us, or None.

    transformers (5.24 still) hands a callable its processors and criteria, but loses the streamer and the assistant on the way, after
    having given the streamer the prompt: an iterator over it would wait for ever. So they are read where they still are, among the
    variables of that function.
    """
    frame: Any = sys._getframe(1)
    for _ in range(CALLERS):
        if frame is None:
            break
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def _check(config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise GraniteError for what this loop doesn't do."""
    mode = config.get_generation_mode(_of_generate("assistant_model"))
    refused = {
        mode.value.replace("_", " "): mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "output_attentions": config.return_dict_in_generate and config.output_attentions,
        "output_hidden_states": config.return_dict_in_generate and config.output_hidden_states,
    }
    refused |= {name: value is not None and value is not False for name, value in model_kwargs.items() if name not in USED}
    found = [name for name, given in refused.items() if given]
    if found:
        raise GraniteError(
            f"fast_decode doesn't do {', '.join(found)}: it decodes greedily and samples; leave custom_generate out for these"
        )
    past = model_kwargs.get(CACHE)
    if past is not None and int(past.get_seq_length()) > 0:
        raise GraniteError(f"{CACHE} holds tokens already: fast_decode has a cache of its own; pass the whole text instead")


def _mask(ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """What of the prompt is no padding; the positions must be those that follow from it."""
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    positions = model_kwargs.get("position_ids")
    if positions is not None and not bool(((mask.cumsum(-1) - 1 == positions) | (mask == 0)).all()):
        raise GraniteError(
            "position_ids aren't those of the attention mask, counted from 0: fast_decode counts them itself; leave them out"
        )
    return mask


def _end_tokens(criteria: Any) -> list[int]:
    return [int(token) for criterion in criteria if isinstance(criterion, EosTokenCriteria) for token in criterion.eos_token_id.flatten()]
