"""The launches of one decode step over stand-in weights: what `examine` traces and compiles.

All memory comes zeroed from the allocator and isn't touched until a kernel reads it, so a model's real sizes fit into any
machine. Values matter only where they choose what is read: embedding rows and the router are random, so that tokens of a
batch choose different experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
from granite_kernels.model.cache import Cache
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.granite import Experts, Layer, Weights
from granite_kernels.model.step import State, step
from torch import Tensor

from granite_kernels import launch
from granite_kernels.formats import get
from granite_kernels.ops import choose
from granite_kernels.weight import Part, Weight
from granite_kernels.workspace import Workspace

from .cards import cards_of

DTYPE = torch.bfloat16
UNQUANTIZED = "none"


def decode_step(preset: str, quantization: str, batch: int, context: int, layers: int, arch: int) -> Callable[[], None]:
    """A function that runs one decode step of `batch` rows with `context` tokens each, through the first `layers` layers, with
    the launch shapes of `arch`.

    `quantization` is "none" (bfloat16) or the name of a format, for all matrices. Raises GraniteError for unknown names.
    """
    config = dataclasses.replace(GraniteConfig.preset(preset), num_hidden_layers=layers)
    weights = stand_in(config, quantization, batch)
    launch.INTERPRETED = launch.Target(arch, cards_of(arch)[0].sms)  # this process is a child of `examine`'s and does nothing else
    # under capture tensors stay on the CPU while kernels are compiled for a GPU
    device = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
    workspace = Workspace.allocate(1 << 16, 1 << 24, "cpu")
    ops = choose("triton", device, DTYPE, workspace=workspace)
    cache = Cache.allocate(config, batch, context, dtype=DTYPE, device=torch.device("cpu"))
    cache.crop(context - 1)
    state = State.allocate(batch, 1, config.vocab_size, torch.device("cpu"))
    state.ids.copy_(torch.arange(batch)[:, None])
    state.positions.fill_(context - 1)
    rotary = torch.zeros(cache.context, config.head_dim, dtype=DTYPE)

    def run() -> None:
        step(config, weights, rotary, state, cache, ops)

    return run


def stand_in(config: GraniteConfig, quantization: str = UNQUANTIZED, batch: int = 1) -> Weights:
    """Weights of `config`, all zero and in memory not yet touched, but for the first `batch` rows of the embedding and routers."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Weight:
        if quantization == UNQUANTIZED:
            return Weight.dense(torch.zeros(rows, columns, dtype=DTYPE))
        planes = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in get(quantization).layout((rows, columns)))
        return Weight(Part(quantization, planes, (rows, columns)))

    def ones() -> Tensor:
        return torch.ones(config.hidden_size, dtype=DTYPE)

    hidden, inner = config.hidden_size, config.intermediate_size
    embed = Weight.dense(torch.zeros(config.vocab_size, hidden, dtype=DTYPE))
    embed.parts[0].planes[0][:batch].normal_(generator=generator)
    head = embed if quantization == UNQUANTIZED and config.tie_word_embeddings else matrix(config.vocab_size, hidden)
    attended = config.num_attention_heads * config.head_dim
    projected = attended + 2 * config.num_key_value_heads * config.head_dim

    def layer() -> Layer:
        if not config.is_moe:
            return Layer(
                ones(), matrix(projected, hidden), matrix(hidden, attended), ones(), matrix(2 * inner, hidden), matrix(hidden, inner)
            )
        count, shared = config.num_local_experts, config.shared_intermediate_size
        experts = Experts(
            torch.zeros(count, hidden, dtype=DTYPE).normal_(generator=generator),
            matrix(count * 2 * inner, hidden),
            matrix(count * hidden, inner),
            matrix(2 * shared, hidden) if shared else None,
            matrix(hidden, shared) if shared else None,
        )
        return Layer(ones(), matrix(projected, hidden), matrix(hidden, attended), ones(), experts=experts)

    return Weights(embed, [layer() for _ in range(config.num_hidden_layers)], ones(), head)
