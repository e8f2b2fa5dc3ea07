"""A mixture of experts in plain PyTorch on the CPU against transformers with grouped_mm, over the same weights.

    python bench/bench_moe_cpu.py [--preset 3.1-1b-a400m] [--layers 4] [--prompt 128] [--new-tokens 16] [--runs 5] [--dtype float32]

Random weights at the preset's sizes, fewer layers, interleaved runs in one process: seconds of a prompt and of a decoded token, and
the median of their ratios, above 1 where ours is the faster. The logits must agree before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.hf.models import CACHE

from granite_kernels import GraniteForCausalLM

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the spread of the logits


def their_model(preset: str, layers: int, dtype: torch.dtype) -> Any:
    """transformers' model of the preset's sizes with `layers` layers and random weights."""
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    config = dataclasses.replace(GraniteConfig.preset(preset), num_hidden_layers=layers).to_dict()
    torch.manual_seed(0)
    made = GraniteMoeConfig.from_dict(config)
    made._experts_implementation = "grouped_mm"
    return GraniteMoeForCausalLM(made).to(dtype).eval()


def seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="3.1-1b-a400m")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    dtype = getattr(torch, arguments.dtype)
    theirs = their_model(arguments.preset, arguments.layers, dtype)
    ours = GraniteForCausalLM.from_transformers(theirs, backend="torch")
    ids = torch.randint(1, 49155, (1, arguments.prompt), generator=torch.Generator().manual_seed(1))
    new = arguments.new_tokens

    def prompt(model: Any) -> Callable[[], Any]:
        return lambda: model(ids, logits_to_keep=1)

    def decode(model: Any) -> Callable[[], float]:
        name = CACHE if model is theirs else "past_key_values"

        def step(past: Any) -> Any:
            return getattr(model(ids[:, :1], use_cache=True, **{name: past}), name)

        past = getattr(model(ids, use_cache=True, logits_to_keep=1), name)

        def run() -> None:
            nonlocal past
            for _ in range(new):
                past = step(past)

        return lambda: seconds(run) / new

    with torch.no_grad():
        assert theirs.config._experts_implementation == "grouped_mm"
        a, b = (model(ids).logits for model in (ours, theirs))
        error = ((a - b).abs().max() / (b.max() - b.min())).item()
        if error > TOLERANCE[dtype]:
            raise SystemExit(f"the logits differ by {error:.2g} of their spread")
        steps = {"ours": decode(ours), "theirs": decode(theirs)}
        rows = []
        for run in range(arguments.runs):
            turns = [("ours", ours), ("theirs", theirs)][:: -1 if run % 2 else 1]  # each begins every other time
            row = {f"prompt, {name}": seconds(prompt(model)) for name, model in turns}
            rows.append(row | {f"token, {name}": steps[name]() for name, _ in turns})
    print(
        f"{arguments.preset}, {arguments.layers} layers, {arguments.dtype}, {torch.get_num_threads()} threads; logits differ by {error:.1e}"
    )
    for what in ("prompt", "token"):
        mine, other = ([row[f"{what}, {name}"] for row in rows] for name in ("ours", "theirs"))
        print(f"{what:<8} ours {1e3 * statistics.median(mine):8.1f} ms   transformers {1e3 * statistics.median(other):8.1f} ms")
    ratios = {what: statistics.median(row[f"{what}, theirs"] / row[f"{what}, ours"] for row in rows) for what in ("prompt", "token")}
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
