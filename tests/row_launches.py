"""One call of each row-wise operation at a model's sizes, to be compiled by the laboratory: nothing is read or computed."""

from __future__ import annotations

import torch

from granite_kernels.kernels.embed import embed
from granite_kernels.kernels.moe import norm_route
from granite_kernels.kernels.norm import add_rms_norm, rms_norm
from granite_kernels.kernels.rope import rope_append
from granite_kernels.kernels.sample import sample_step
from granite_kernels.kernels.swiglu import swiglu
from granite_kernels.weight import Weight


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


def rows() -> None:
    for hidden in (2048, 16384):
        rms_norm(empty(64, hidden), empty(hidden), eps=1e-5)
        add_rms_norm(empty(64, hidden), empty(64, hidden), empty(hidden), eps=1e-5, scale=0.22)
    for hidden, experts in ((1024, 32), (1536, 40)):
        norm_route(empty(1, 4, hidden), empty(hidden), empty(experts, hidden, dtype=torch.float32), top_k=8, eps=1e-5)
    swiglu(empty(64, 2 * 8192))
    for head_dim in (64, 128):
        q, k, v = empty(1, 64, 48, head_dim).split((32, 8, 8), dim=2)
        k_cache, v_cache = empty(2, 1, 8, 1024, head_dim).unbind()
        rope_append(q, k, v, empty(4096, head_dim), ints(1, 64), ints(1), k_cache, v_cache)
    embed(torch.empty(1, 64, dtype=torch.int64), Weight.dense(empty(49155, 2048)), multiplier=12.0, dtype=torch.bfloat16)


def choice() -> None:
    longs, floats = torch.empty(4, 99, dtype=torch.int64), torch.empty(99, 4)
    seen = torch.empty(4, 49155, dtype=torch.uint8)
    state = longs[:, :1].contiguous(), ints(4, 1), ints(4), ints(4), longs
    sample_step(empty(4, 49155), floats, seen, torch.empty(4), *state)
