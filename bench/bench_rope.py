"""rope_append: q and k rotated, k and v written into the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from granite_kernels.bench.harness import Case, Inputs
from granite_kernels.bench.place import empty_slots, places, written
from granite_kernels.bench.rivals import liger
from granite_kernels.bench.shapes import Setting, rows_cost


def cases(setting: Setting) -> list[Case]:
    config = setting.config
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (setting.normal(*setting.shape, count, head_dim, seed=count) for count in (heads, kv_heads, kv_heads))
    width = (heads + 2 * kv_heads) * head_dim

    def theirs(inputs: Inputs) -> Inputs:
        q, k, _, rotary, positions = inputs.args[:5]
        cos, sin = (torch.cat((half, half), -1) for half in rotary[positions].chunk(2, -1))
        return Inputs((q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), cos, sin))

    return [
        Case(
            op="rope_append",
            file="rope",
            size=f"{heads}+{kv_heads} x {head_dim}",
            setting=setting,
            inputs=Inputs((q, k, v, *places(setting))),
            cost=rows_cost(setting, width, 2, shared=setting.tokens * head_dim),
            rivals=(liger("liger_rope", theirs, whole=False),),
            results=written(setting),
            reset=empty_slots(setting),
        )
    ]


def test_rope(measured: Callable[[], None]) -> None:
    measured()
