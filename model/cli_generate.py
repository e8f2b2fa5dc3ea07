"""`generate`: stream a completion, then say how fast it was."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from .cli_options import MODEL, SAMPLING, model_options, sampling_options, with_options

if TYPE_CHECKING:
    from .model import GraniteForCausalLM


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--prompt", required=True, help="The text to answer or, with --raw, to continue.")
@click.option("--raw", is_flag=True, help="Leave the chat template out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@with_options(SAMPLING, MODEL)
def generate(model: str, prompt: str, raw: bool, as_json: bool, **values: Any) -> None:
    """Stream a completion of --prompt by MODEL; a last line tells speed and memory."""
    from .sources import open_model

    loaded = open_model(model, **model_options(values))
    templated = not raw and loaded.tokenizer is not None and loaded.tokenizer.chat_template is not None
    asked: Any = [{"role": "user", "content": prompt}] if templated else prompt
    text = ""
    for piece in loaded.stream(asked, **sampling_options(values)):
        text += piece
        if not as_json:
            click.echo(piece, nl=False)
    figures = measured(loaded)
    if as_json:
        click.echo(json.dumps({"text": text, **figures}, ensure_ascii=False))
    else:
        click.echo()
        click.echo(closing_line(loaded, figures), err=True)


def measured(model: GraniteForCausalLM) -> dict[str, float | int]:
    """The figures of the last generation under the names that --json prints."""
    stats = model.last_stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "prompt_tokens_per_second": stats.prompt_tokens_per_second,
        "tokens_per_second": stats.tokens_per_second,
        "peak_memory_bytes": peak_memory(model),
        "weight_bytes": model.memory().weights,
    }


def peak_memory(model: GraniteForCausalLM) -> int:
    """Bytes: what the GPU's allocator held at most or, on a CPU, the process."""
    if model.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(model.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def closing_line(model: GraniteForCausalLM, figures: dict[str, float | int]) -> str:
    """One line: tokens, tokens/s, the bytes a second that decoding read, peak memory."""
    rate = figures["tokens_per_second"]
    read = step_bytes(model, figures["prompt_tokens"] + figures["new_tokens"] / 2)
    return (
        f"prompt {figures['prompt_tokens']} tokens, {figures['prompt_tokens_per_second']:.1f} tokens/s; "
        f"generation {figures['new_tokens']} tokens, {rate:.1f} tokens/s, {rate * read / 1e9:.1f} GB/s; "
        f"peak memory {figures['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def step_bytes(model: GraniteForCausalLM, context: float) -> float:
    """Bytes that decoding one token reads with `context` tokens in the cache: the weights that it touches, keys and values."""
    return model.memory().active + context * model.config.cache_bytes_per_token(model.dtype)
