"""Requests served by a model of Granite 2B's widths under launch capture: what is compiled, and when."""

from __future__ import annotations

import dataclasses
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from granite_kernels.bench.offline.capture import Launch, capture
from granite_kernels.bench.offline.pretend import on_gpu
from granite_kernels.bench.offline.steps import stand_in
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.model import GraniteForCausalLM

from granite_kernels.errors import GraniteError


@contextmanager
def serving(arch: int, backend: str = "triton", layers: int = 1) -> Iterator[tuple[GraniteForCausalLM, list[Launch]]]:
    """A model with 2B's matrices in few layers, on a pretended GPU, and the launches that it makes."""
    config = dataclasses.replace(GraniteConfig.preset("3.1-2b"), num_hidden_layers=layers)
    weights = stand_in(config)
    with capture(arch) as launches, on_gpu():
        yield GraniteForCausalLM(config, weights, backend=backend), launches


def requests(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Arguments of `generate`: batches of 1 to 16, lengths of 1 to 4,096, with and without padding, greedy and sampled."""
    draw = random.Random(seed)
    for number in range(count):
        batch = draw.randint(1, 16)
        tokens = draw.choice((draw.randint(1, 20), draw.randint(1, 4096)))
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        if number % 3 == 1:
            for row in range(1, batch):
                mask[row, : draw.randint(0, tokens - 1)] = 0
        sampling = dict(do_sample=True, top_k=draw.choice((0, 40)), top_p=0.9, repetition_penalty=1.1, seed=number) if number % 2 else {}
        yield dict(
            input_ids=torch.zeros(batch, tokens, dtype=torch.int64),
            attention_mask=mask,
            max_new_tokens=draw.randint(1, 6),
            eos_token_id=[],
            **sampling,
        )


def warmed(arch: int, count: int) -> dict[str, Any]:
    """What a warm-up compiles, and what `count` requests after it compile."""
    with serving(arch) as (model, launches):
        model.warmup()
        before = len(launches)
        for request in requests(count, seed=arch):
            model.generate(**request)
        for tokens in (40, 91, 77):  # a conversation, whose prompts begin like what the cache holds
            list(model._run(model._request(torch.zeros(1, tokens, dtype=torch.int64), max_new_tokens=4, eos_token_id=[]), reuse=True))
        model(torch.zeros(2, 30, dtype=torch.int64)[:, 1:])  # logits of every position
        later = launches[before:]
    kernels = sorted({launch.name for launch in launches})
    return {
        "kernels": kernels,
        "variants": sum(launch.new for launch in launches),
        "new": [f"{x.name} {x.constexprs} {x.divisible}" for x in later if x.new],
    }


def cold(arch: int) -> dict[str, Any]:
    """Seconds that the warm-up takes, and how many kernels it compiles."""
    with serving(arch) as (model, launches):
        begun = time.perf_counter()
        model.warmup()
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "variants": len({launch.hash for launch in launches})}


def broken(backend: str) -> dict[str, Any]:
    """Two requests where the compiler refuses the kernel that samples: what was said, what runs, and whether a step was captured."""
    from granite_kernels.kernels import sample

    sample.BLOCK = 1000  # no power of two
    with serving(90, backend=backend) as (model, launches), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for _ in range(2):
                result = model.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=3, eos_token_id=[])
        except GraniteError as error:
            return {"error": str(error)}
    return {
        "said": [str(warning.message) for warning in said],
        "rows": [dataclasses.asdict(row) for row in model.kernels()],
        "launched": sorted({launch.name for launch in launches}),
        "captured": model._captured is not None,
        "tokens": list(result.shape),
    }
