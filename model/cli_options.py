"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

MODEL = (
    click.option("--quantization", metavar="FORMAT", help="Quantize 16-bit weights while loading: int8, int4, q8_0, q6_k, q4_k_m."),
    click.option("--dtype", default="auto", show_default=True, help="Activations and dense weights: auto, bfloat16, float16, float32."),
    click.option("--device", default=None, help="cuda, cuda:1 or cpu. Default: the first GPU, else the CPU."),
    click.option("--backend", default="auto", show_default=True, help="auto, triton (or an error), torch (plain PyTorch)."),
    click.option("--max-context", type=int, default=None, help="A limit below the checkpoint's own."),
)
SAMPLING = (
    click.option("--max-new-tokens", type=int, default=256, show_default=True),
    click.option("--temperature", type=float, help="0 is greedy. Default: 1 where --top-k or --top-p is given, else 0."),
    click.option("--top-k", type=int, default=0, show_default=True, help="0 is off."),
    click.option("--top-p", type=float, default=1.0, show_default=True),
    click.option("--seed", type=int, default=None),
)


def with_options(*groups: tuple[Callable[[Function], Function], ...]) -> Callable[[Function], Function]:
    """The options of all groups, listed in order."""

    def decorate(function: Function) -> Function:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def model_options(values: dict[str, Any]) -> dict[str, Any]:
    """Take what `from_pretrained` takes out of a verb's values."""
    return {name: values.pop(name) for name in ("quantization", "dtype", "device", "backend", "max_context")}


def sampling_options(values: dict[str, Any]) -> dict[str, Any]:
    """A verb's remaining values as arguments of `generate`; who narrows the choice of tokens wants them drawn."""
    narrowed = values["top_k"] != 0 or values["top_p"] != 1.0
    temperature = values["temperature"] if values["temperature"] is not None else float(narrowed)
    return {**values, "do_sample": True, "temperature": temperature} if temperature != 0 else {**values, "temperature": 1.0}
