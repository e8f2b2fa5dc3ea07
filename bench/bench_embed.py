"""embed: the rows of the tokens, times the embedding multiplier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from granite_kernels.bench.harness import Case, Inputs, Rival
from granite_kernels.bench.shapes import Cost, Setting

from granite_kernels.weight import dense_matrix


def cases(setting: Setting) -> list[Case]:
    vocab, hidden = setting.config.vocab_size, setting.config.hidden_size
    ids = torch.randint(0, vocab, setting.shape, generator=torch.Generator().manual_seed(0)).to(setting.device)
    weight = setting.weight(vocab, hidden)
    row = weight.nbytes / vocab  # bytes as stored
    multiplier = setting.config.embedding_multiplier

    def library(inputs: Inputs) -> Inputs:
        ids, weight = inputs.args
        return Inputs((ids, dense_matrix(weight.parts[0], setting.dtype).detach()))

    return [
        Case(
            op="embed",
            file="embed",
            size=f"{vocab} x {hidden}",
            setting=setting,
            inputs=Inputs((ids, weight), {"multiplier": multiplier, "dtype": setting.dtype}),
            cost=Cost(int(setting.tokens * (row + 8 + hidden * setting.dtype.itemsize)), setting.tokens * hidden),
            rivals=(Rival("F.embedding", lambda: lambda ids, table: torch.nn.functional.embedding(ids, table) * multiplier, library),),
            role="embed",
            times=1,
            packs=True,
        )
    ]


def test_embed(measured: Callable[[], None]) -> None:
    measured()
