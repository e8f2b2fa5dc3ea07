"""rms_norm and add_rms_norm: one read and one write of [tokens, hidden], two of each with the residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from granite_kernels.bench.harness import Case, Inputs, Rival
from granite_kernels.bench.rivals import liger
from granite_kernels.bench.shapes import Setting, rows_cost


def cases(setting: Setting) -> list[Case]:
    hidden, eps = setting.config.hidden_size, setting.config.rms_norm_eps
    x, residual = (setting.normal(*setting.shape, hidden, seed=seed) for seed in range(2))
    weight = setting.normal(hidden, seed=2)
    library = Rival("F.rms_norm", lambda: lambda x, weight, eps: torch.nn.functional.rms_norm(x, weight.shape, weight, eps))
    keywords = {"eps": eps}
    norm = Case(
        op="rms_norm",
        file="norm",
        size=f"{hidden}",
        setting=setting,
        inputs=Inputs((x, weight), keywords),
        cost=rows_cost(setting, hidden, 2, shared=hidden),
        rivals=(library, liger("liger_rms_norm", lambda inputs: Inputs((*inputs.args, eps)), in_place=False)),
    )
    added = Case(
        op="add_rms_norm",
        file="norm",
        size=f"{hidden}",
        setting=setting,
        inputs=Inputs((x, residual, weight), keywords),
        cost=rows_cost(setting, hidden, 4, shared=hidden, flops=6),
        rivals=(liger("liger_fused_add_rms_norm", lambda inputs: Inputs((*inputs.args, eps)), in_place=False),),
    )
    return [norm, added]


def test_norm(measured: Callable[[], None]) -> None:
    measured()
