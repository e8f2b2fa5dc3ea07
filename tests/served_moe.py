"""Requests served by a mixture of experts at real sizes under launch capture, a step of it and what its compiled experts cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from granite_kernels.bench.offline.capture import capture
from granite_kernels.bench.offline.pretend import on_gpu
from granite_kernels.bench.offline.steps import stand_in
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.model import GraniteForCausalLM

from tests import served

LAYERS = 2


def warmed(preset: str, arch: int, count: int, context: int) -> dict[str, Any]:
    """What is compiled after a warm-up for `context` tokens by a step of each batch, prompts that meet every launch shape and
    `count` random requests; and the launches of a step, by name.
    """
    config = dataclasses.replace(GraniteConfig.preset(preset), num_hidden_layers=LAYERS)
    weights = stand_in(config)
    with capture(arch) as launches, on_gpu():
        model = GraniteForCausalLM(config, weights, backend="triton")
        model.warmup(context=context)
        before = len(launches)
        for batch in range(1, 17):
            model.generate(torch.zeros(batch, 1, dtype=torch.int64), max_new_tokens=2, eos_token_id=[])
        begin = len(launches)
        model(torch.zeros(1, 1, dtype=torch.int64))
        step = Counter(launch.name for launch in launches[begin:])
        for request in served.requests(count, seed=arch):
            model.generate(**request)
        for tokens in (17, 40, 600):
            model(torch.zeros(2, tokens, dtype=torch.int64))
        later = launches[before:]
    return {
        "new": [f"{x.name} {x.constexprs} {x.divisible}" for x in later if x.new],
        "step": step,
        "grouped": len({launch.hash for launch in launches if launch.name == "_grouped_kernel"}),
    }
