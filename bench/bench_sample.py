"""sample: a token from the logits of each sequence, greedy and drawn with top-k and top-p."""

from __future__ import annotations

from collections.abc import Callable

import torch
from granite_kernels.bench.harness import Case, Inputs, Rival
from granite_kernels.bench.shapes import Setting, rows_cost

SETTINGS = {"greedy": (0.0, 0.0, 1.0, 1.0), "top-k 40, top-p 0.9": (0.8, 40.0, 0.9, 1.0)}


def cases(setting: Setting) -> list[Case]:
    if not setting.decoding:
        return []
    vocab, batch = setting.config.vocab_size, setting.tokens
    logits = setting.normal(batch, vocab, scale=3.0)
    uniforms = torch.rand(batch, generator=torch.Generator().manual_seed(0)).to(setting.device)
    seen = torch.zeros(batch, vocab, dtype=torch.uint8, device=setting.device)
    argmax = Rival("argmax", lambda: lambda logits, *_: logits.argmax(-1))
    return [
        Case(
            op="sample",
            file="sample",
            size=f"{vocab}, {name}",
            setting=setting,
            inputs=Inputs((logits, uniforms, seen, torch.tensor(values, device=setting.device))),
            cost=rows_cost(setting, vocab, 1, flops=1),
            rivals=(argmax,) if name == "greedy" else (),
            role="sample" if name == "greedy" else "",
            times=1 if name == "greedy" else 0,
            compiles=False,  # the reference reads its settings on the host
        )
        for name, values in SETTINGS.items()
    ]


def test_sample(measured: Callable[[], None]) -> None:
    measured()
