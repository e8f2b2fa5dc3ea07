"""The plain path on the CPU, float32: SmolLM2-135M-Instruct against its own matmuls and against transformers' eager generate.

    python bench/bench_cpu.py [--runs 5] [--new-tokens 32]

Three figures, medians of interleaved runs in one process:
  floor          the time of a step's bare products over the time of the step, once with the matrices as PyTorch's linear layers
                 hold them (rows contiguous) and once as the plain path lays them out
  transformers   tokens/s of `generate` over those of transformers' eager generate, same prompt, same tokens
  loading        seconds to load the GGUF file, ours and transformers'
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from granite_kernels.model.sources import demo_path
from torch import Tensor

from granite_kernels import GraniteForCausalLM

PROMPT = "Name the capital of France and one fact about it."


def seconds(run: Callable[[], Any], repeat: int = 1) -> float:
    begun = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - begun) / repeat


def products(model: GraniteForCausalLM) -> tuple[Callable[[], None], Callable[[], None]]:
    """The bare products of one decode step: over row-major copies of the matrices, and over the matrices as they are."""
    weights = model.weights
    layers = [weight for layer in weights.layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    matrices = [weight.parts[0].planes[0] for weight in (*layers, weights.head) if weight is not None]
    rows = [matrix.contiguous() for matrix in matrices]
    inputs = {matrix.shape[1]: torch.randn(1, 1, matrix.shape[1]) for matrix in matrices}

    def run(over: list[Tensor]) -> None:
        for matrix in over:
            F.linear(inputs[matrix.shape[1]], matrix)

    return lambda: run(rows), lambda: run(matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    from transformers import AutoModelForCausalLM

    path = demo_path()

    def load_theirs() -> Any:
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    begun = time.perf_counter()
    theirs = load_theirs()
    their_load = time.perf_counter() - begun
    our_loads = [seconds(lambda: GraniteForCausalLM.from_pretrained(path, device="cpu")) for _ in range(arguments.runs)]
    ours = GraniteForCausalLM.from_pretrained(path, device="cpu")

    assert ours.tokenizer is not None
    ids = torch.tensor([ours.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=True)])
    mask, new = torch.ones_like(ids), arguments.new_tokens
    natural, laid_out = products(ours)

    def run_ours() -> Tensor:
        return ours.generate(ids, max_new_tokens=new, eos_token_id=[])

    def run_theirs() -> Tensor:
        return theirs.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    rows: list[dict[str, float]] = []
    with torch.no_grad():
        for warm_up in (natural, laid_out, run_ours, run_theirs):
            warm_up()
        for _ in range(arguments.runs):
            ours_total = seconds(run_ours)
            rows.append(
                {
                    "floor_rows": seconds(natural, 8),
                    "floor_as_laid_out": seconds(laid_out, 8),
                    "step": ours.last_stats.generation_seconds / (new - 1),
                    "ours": ours_total,
                    "theirs": seconds(run_theirs),
                }
            )
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    ratios = {
        "floor_rows_over_step": statistics.median(row["floor_rows"] / row["step"] for row in rows),
        "floor_as_laid_out_over_step": statistics.median(row["floor_as_laid_out"] / row["step"] for row in rows),
        "speedup_over_transformers": statistics.median(row["theirs"] / row["ours"] for row in rows),
        "loading_speedup": their_load / statistics.median(our_loads),
    }
    print(f"step {1e3 * median['step']:.1f} ms, {1 / median['step']:.1f} tokens/s, {torch.get_num_threads()} threads")
    print(f"bare products {1e3 * median['floor_rows']:.1f} ms (rows contiguous), {1e3 * median['floor_as_laid_out']:.1f} ms (as laid out)")
    print(f"generate of {new}: ours {median['ours']:.2f} s, transformers {median['theirs']:.2f} s")
    print(f"loading: ours {statistics.median(our_loads):.2f} s, transformers {their_load:.2f} s")
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
