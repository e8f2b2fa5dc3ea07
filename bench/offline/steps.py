"""The launches of one decode step over stand-in weights: what `examine` traces and compiles.

All memory comes zeroed from the allocator and isn't touched until a kernel reads it, so a model's real sizes fit into any
machine. Values matter only where they choose what is read: embedding rows and the router are random, so that tokens of a
batch choose different experts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
import triton
from granite_kernels.model.cache import Cache
from granite_kernels.model.checkpoint.random import RandomCheckpoint
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.granite import Weights
from granite_kernels.model.quantization import plan
from granite_kernels.model.step import State, step
from granite_kernels.model.weights import Loader, load_weights
from torch import Tensor

from granite_kernels import launch
from granite_kernels.formats import get
from granite_kernels.formats.mix import QUANTIZATIONS
from granite_kernels.ops import choose
from granite_kernels.weight import DENSE, Part, Weight
from granite_kernels.workspace import Workspace

from .cards import cards_of

DTYPE = torch.bfloat16
UNQUANTIZED = "none"


def decode_step(preset: str, quantization: str, batch: int, context: int, layers: int, arch: int) -> Callable[[], None]:
    """A function that runs one decode step of `batch` rows with `context` tokens each, through the first `layers` layers, with
    the launch shapes of `arch`.

    `quantization` is "none" (bfloat16), what `from_pretrained` takes, or the name of a format, for all matrices. Raises GraniteError
    for unknown names.
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


class Blank(Loader):
    """Layers of the checkpoint's shapes, in the formats asked for; norms are one and all else zero, in memory not yet touched."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.ones(self.checkpoint.tensors[name].shape, dtype=dtype or self.dtype, device=self.device)

    def weight(self, *names: str) -> Weight:
        parts = []
        for format, group in itertools.groupby(names, key=lambda name: self.formats.get(name, DENSE)):
            shapes = [self.checkpoint.tensors[name].shape for name in group]
            shape = sum(math.prod(shape[:-1]) for shape in shapes), shapes[0][-1]
            layout = ((shape, self.dtype),) if format == DENSE else get(format).layout(shape)
            parts.append(Part(format, tuple(torch.zeros(size, dtype=dtype, device=self.device) for size, dtype in layout), shape))
        return Weight(*parts)

    experts = weight


def stand_in(config: GraniteConfig, quantization: str = UNQUANTIZED, batch: int = 1) -> Weights:
    """Weights of `config`, zero but for the first `batch` rows of a dense embedding and the routers."""
    generator = torch.Generator().manual_seed(0)
    checkpoint = RandomCheckpoint(config, seed=0, dtype=DTYPE, device=torch.device("cpu"))
    matrices = [name for name, info in checkpoint.tensors.items() if len(info.shape) > 1 and not name.endswith("router.layer.weight")]
    if quantization in QUANTIZATIONS:
        formats = plan(checkpoint.tensors, config.num_hidden_layers, quantization, "random weights")
    else:
        formats = {} if quantization == UNQUANTIZED else dict.fromkeys(matrices, get(quantization).name)
    weights = load_weights(Blank(checkpoint, DTYPE, torch.device("cpu"), formats=formats), config)
    (embed,) = weights.embed.parts
    if embed.format == DENSE:
        embed.planes[0].data[:batch].normal_(generator=generator)
    for layer in weights.layers:
        if layer.experts is not None:
            layer.experts.router.data.normal_(generator=generator)
    return weights
