"""The range checks of a configuration: everything is refused here, before any size reaches an allocation.

The upper limits aren't those of any model; they are where a number is surely a mistake or an attack (a hidden size
of 2^40).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from granite_kernels.errors import GraniteError

ARCHITECTURES = ("granite", "granitemoe", "granitemoeshared", "llama")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MOE_ARCHITECTURES = ("granitemoe", "granitemoeshared")

INTEGERS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 2**31 - 1),
    "num_local_experts": (0, 4096),
    "num_experts_per_tok": (0, 4096),
    "shared_intermediate_size": (0, 2**20),
}
NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
LARGEST_PARAMETER_COUNT = 2**40


class Refusals:
    """Words a refusal: the source, the key as that source spells it, what was found, what was expected."""

    def __init__(self, source: str, keys: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.keys = keys or {}

    def key(self, field: str) -> str:
        return self.keys.get(field, field)

    def error(self, field: str, found: object, expected: str) -> GraniteError:
        text = repr(found)
        shown = text if len(text) <= 80 else text[:77] + "..."
        return GraniteError(f"{self.source}: {self.key(field)} is {shown}; expected {expected}")


def check_config(values: Mapping[str, Any], refuse: Refusals) -> None:
    """Raise GraniteError for the first field of `values` (GraniteConfig's own names) that can't be right."""
    architecture = values["architecture"]
    if architecture not in ARCHITECTURES:
        raise refuse.error("architecture", architecture, "one of " + ", ".join(ARCHITECTURES))
    for field, (low, high) in INTEGERS.items():
        integer(values[field], low, high, field, refuse)
    for field in NUMBERS:
        number = values[field]
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < 1e30:  # false for NaN too
            raise refuse.error(field, number, "a finite number above 0")
    if values["rms_norm_eps"] >= 1:
        raise refuse.error("rms_norm_eps", values["rms_norm_eps"], "a small number such as 1e-05")
    if not isinstance(values["tie_word_embeddings"], bool):
        raise refuse.error("tie_word_embeddings", values["tie_word_embeddings"], "true or false")
    if values["dtype"] not in DTYPES.values():
        raise refuse.error("dtype", values["dtype"], "one of " + ", ".join(DTYPES))
    _check_heads(values, refuse)
    _check_experts(values, refuse)
    _check_tokens(values, refuse)
    count = parameter_count(values)
    if count > LARGEST_PARAMETER_COUNT:
        raise GraniteError(
            f"{refuse.source}: the sizes amount to {count:,} parameters; expected at most {LARGEST_PARAMETER_COUNT:,}, "
            f"so one of hidden_size, intermediate_size, num_hidden_layers or num_local_experts is wrong"
        )


def integer(value: object, low: int, high: int, field: str, refuse: Refusals) -> int:
    """`value` when it is an int (no bool) within the limits, else GraniteError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refuse.error(field, value, f"an integer from {low} to {high}")
    return value


def parameter_count(values: Mapping[str, Any], experts: int | None = None) -> int:
    """Weights of the whole model, a tied head counted once; with `experts`, those touched when that many are chosen."""
    hidden = values["hidden_size"]
    rows = values["head_dim"] * (2 * values["num_attention_heads"] + 2 * values["num_key_value_heads"])
    layer = hidden * rows + 2 * hidden
    if values["num_local_experts"]:
        chosen = values["num_local_experts"] if experts is None else experts
        layer += hidden * values["num_local_experts"]
        layer += 3 * hidden * (values["intermediate_size"] * chosen + values["shared_intermediate_size"])
    else:
        layer += 3 * hidden * values["intermediate_size"]
    embeddings = 1 if values["tie_word_embeddings"] else 2
    return int(embeddings * values["vocab_size"] * hidden + values["num_hidden_layers"] * layer + hidden)


def _check_heads(values: Mapping[str, Any], refuse: Refusals) -> None:
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        raise refuse.error("num_attention_heads", heads, f"a multiple of {refuse.key('num_key_value_heads')}, {kv_heads}")
    if values["head_dim"] % 2:
        raise refuse.error("head_dim", values["head_dim"], "an even number, because RoPE turns pairs")


def _check_experts(values: Mapping[str, Any], refuse: Refusals) -> None:
    architecture, experts, chosen = values["architecture"], values["num_local_experts"], values["num_experts_per_tok"]
    if architecture not in MOE_ARCHITECTURES:
        for field in ("num_local_experts", "num_experts_per_tok", "shared_intermediate_size"):
            if values[field]:
                raise refuse.error(field, values[field], f"none for the dense architecture {architecture}")
        return
    if experts < 1:
        raise refuse.error("num_local_experts", experts, f"at least 1 for {architecture}")
    if not 1 <= chosen <= experts:
        raise refuse.error("num_experts_per_tok", chosen, f"1 to {refuse.key('num_local_experts')}, {experts}")
    if architecture == "granitemoe" and values["shared_intermediate_size"]:
        raise refuse.error("shared_intermediate_size", values["shared_intermediate_size"], "none; granitemoeshared has one")


def _check_tokens(values: Mapping[str, Any], refuse: Refusals) -> None:
    last = values["vocab_size"] - 1
    for field in ("bos_token_id", "pad_token_id"):
        if values[field] is not None:
            integer(values[field], 0, last, field, refuse)
    if not isinstance(values["eos_token_id"], tuple):
        raise refuse.error("eos_token_id", values["eos_token_id"], "a tuple of token ids")
    for token in values["eos_token_id"]:
        integer(token, 0, last, "eos_token_id", refuse)
