"""The decode loop with the choice of tokens left to others: logits come out, tokens go in; the step between is the captured one."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from . import generate as generation
from . import granite
from .model import GraniteForCausalLM
from .request import Request


@torch.no_grad()
def drive(model: GraniteForCausalLM, request: Request) -> Generator[Tensor, Tensor, None]:
    """Yield the logits [batch, vocab] behind the prompt, then those behind each token that is sent, int64 [batch].

    A tensor that was yielded is overwritten by the next step. Up to request.max_new_tokens - 1 tokens may be sent; close it when done.
    """
    with model._serving():
        need = request.prompt_tokens + request.max_new_tokens
        engine, cache, state = model._engine(need), model._take_cache(request, need), model._take_state(request)
        model._held = []
        cache.crop(0)
        cache.starts.copy_((~request.present).sum(1))
        out = model._take_logits(request)
        run = model._step_function(engine, state, cache, out)
        positions = generation.slot_positions(cache.starts, 0, request.prompt_tokens)
        x = generation.hidden(engine, request.ids, positions, cache, keep=1)
        state.begin(request.ids, request.present, positions[:, -1] + 1, request.sampling, request.seed)
        tokens = yield granite.logits(engine.config, engine.weights, x, engine.ops)[:, -1]
        while True:
            state.ids.copy_(tokens[:, None])
            run()
            cache.length += 1
            tokens = yield out
