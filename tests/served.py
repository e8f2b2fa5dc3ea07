"""Requests served by a model of Granite 2B's widths under launch capture: what is compiled, and when."""

from __future__ import annotations

import dataclasses
import random
import re
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from granite_kernels.bench.offline import metrics
from granite_kernels.bench.offline.capture import Launch, capture
from granite_kernels.bench.offline.cards import cards_of
from granite_kernels.bench.offline.examine import STEP, run_step
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


def examined(arch: int, count: int, steps: list[tuple[str, int]]) -> dict[str, Any]:
    """What a warm-up compiles and the CPU seconds it takes, with an empty cache; what `count` requests after it compile; and the
    launches of decode steps, (preset, batch) each.
    """
    with serving(arch) as (model, launches):
        begun = cpu_seconds()
        model.warmup()
        seconds = cpu_seconds() - begun
        before = len(launches)
        for request in requests(count, seed=arch):
            model.generate(**request)
        for tokens in (40, 91, 77):  # a conversation, whose prompts begin like what the cache holds
            list(model._run(model._request(torch.zeros(1, tokens, dtype=torch.int64), max_new_tokens=4, eos_token_id=[]), reuse=True))
        model(torch.zeros(2, 30, dtype=torch.int64)[:, 1:])  # logits of every position
    known = {launch.hash for launch in launches}
    told: dict[str, Any] = {
        "seconds": seconds,
        "variants": len({launch.hash for launch in launches[:before]}),
        "kernels": sorted({launch.name for launch in launches}),
        "new": [f"{x.name} {x.constexprs} {x.divisible}" for x in launches[before:] if x.new],
        "unseen": [],
        "steps": [],
    }
    for preset, batch in steps:
        with capture(arch) as launches:
            run_step(STEP, preset, "none", batch, 1024, 1, arch)
        told["steps"].append([compiled_code(launch, measured=arch == 90) for launch in launches])
        if preset == "3.1-2b":
            told["unseen"] += [f"{x.name} {x.constexprs} {x.divisible}" for x in launches if x.hash not in known]
    return told


def compiled_code(launch: Launch, *, measured: bool) -> dict[str, Any]:
    """What the compiler says of a launch and, where it is measured, what its machine code shows, which takes longer."""
    widths = re.findall(r"ld\.global\S*evict_first\S*?((?:\.v\d)?\.b\d+)", launch.ptx)
    told: dict[str, Any] = {"name": launch.name, "shared": launch.shared, "pdl": launch.pdl, "local": launch.spill_bytes, "widths": widths}
    if measured:
        code = metrics.measure(launch, ("planes",))
        told |= {"spills": code.spills, "instructions": code.dynamic_instructions, "streamed": sorted(code.streamed_widths)}
        told["flight"] = code.in_flight_per_sm(cards_of(launch.arch)[0].sms)
    return told


def cpu_seconds() -> float:
    """Of this process and of the compilers that it ran: no less than the wall clock shows where the cores are free."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


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
