"""attention: causal over the prompt's own keys; from 17 tokens on, below that decode attention serves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from granite_kernels.bench.harness import Case, Inputs
from granite_kernels.bench.place import caches, lengths
from granite_kernels.bench.rivals import sdpa
from granite_kernels.bench.shapes import Setting, attention_cost


def case(setting: Setting, op: str) -> Case:
    config = setting.config
    q = setting.normal(*setting.shape, config.num_attention_heads, config.head_dim)
    held = lengths(setting)
    seen = f"{setting.held + setting.shape[1]} slots"
    return Case(
        op=op,
        file=op,
        size=f"{config.num_attention_heads}/{config.num_key_value_heads} x {config.head_dim}, {seen}",
        setting=setting,
        inputs=Inputs((q, *caches(setting), held, torch.zeros_like(held)), {"scale": config.attention_multiplier}),
        cost=attention_cost(setting),
        rivals=(sdpa(setting),),
        role="attention" if setting.decoding else "",
        times=config.num_hidden_layers if setting.decoding else 0,
    )


def cases(setting: Setting) -> list[Case]:
    return [] if setting.decoding else [case(setting, "attention")]


def test_attention(measured: Callable[[], None]) -> None:
    measured()
