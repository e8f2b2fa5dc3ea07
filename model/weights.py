"""Named tensors become layers: q|k|v and gate|up fused, placed and converted, one tensor at a time. The only file that knows names.

Everything is streamed: at most one source tensor a thread is in memory beside the weights that are already built.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from granite_kernels.weight import Part, Weight

from .checkpoint import Checkpoint, Stored
from .checkpoint.layout import EMBEDDING, HEAD
from .config import GraniteConfig
from .granite import Experts, Layer, Weights
from .packing import pack, stack, stack_experts, values
from .workers import run

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Loader:
    """Reads tensors of a checkpoint by their transformers names into `dtype` on `device`.

    `formats` names the matrices that are held packed, and how (quantization.py); the others are dense.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    column_major: bool = False
    progress: Progress | None = None
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def stored(self, name: str) -> Stored:
        if self.progress is not None:
            self.progress(name)
        return self.checkpoint.read(name)

    def into(self, target: Tensor, name: str) -> None:
        """Fill `target` with the tensor's values, dequantizing packed blocks."""
        stored = self.stored(name)
        dense = stored.data if stored.data.is_floating_point() and not stored.metadata else values(stored, target.dtype)
        target.copy_(dense.view(target.shape))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(self.checkpoint.tensors[name].shape, dtype=dtype or self.dtype, device=self.device)
        self.into(out, name)
        return out

    def part(self, name: str) -> Part:
        """The tensor as the checkpoint packs it, which only reading it tells for sure, or else quantized as `formats` says."""
        format = None if self.checkpoint.tensors[name].packed else self.formats.get(name)
        return pack(self.stored(name), format, self.dtype, self.device)

    def weight(self, *names: str) -> Weight:
        """The named tensors' rows, in that order: one dense matrix, or packed parts."""
        if any(name in self.formats for name in names):
            return stack([self.part(name) for name in names])
        shapes = [self.checkpoint.tensors[name].shape for name in names]
        matrix = empty_matrix(sum(rows for rows, _ in shapes), shapes[0][1], self.dtype, self.device, self.column_major)
        row = 0
        for name, (rows, _) in zip(names, shapes, strict=True):
            self.into(matrix[row : row + rows], name)
            row += rows
        return Weight.dense(matrix)

    def experts(self, *names: str) -> Weight:
        """Tensors [experts, rows, columns], joined along the rows of each expert, as one matrix [experts * rows, columns]."""
        if any(name in self.formats for name in names):
            packed = stack_experts([self.part(name) for name in names], self.checkpoint.tensors[names[0]].shape[0])
            if packed is not None:
                return packed
        shapes = [self.checkpoint.tensors[name].shape for name in names]
        count, _, columns = shapes[0]
        stack = torch.empty(count, sum(shape[1] for shape in shapes), columns, dtype=self.dtype, device=self.device)
        row = 0
        for name, (_, rows, _) in zip(names, shapes, strict=True):
            self.into(stack[:, row : row + rows], name)
            row += rows
        return Weight.dense(stack.view(-1, columns))


def prefers_column_major(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    """Whether plain PyTorch reads the matrices faster with their columns contiguous.

    True for float32 on a CPU: MKL's product of one row streams such a matrix at 20 GB/s where it reads the usual layout at 12
    (two cores of an AMD Zen 3), and decoding is nothing but that. In 16 bits it is the other way round, by far.
    """
    return device.type == "cpu" and dtype == torch.float32 and backend != "triton"


def empty_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device, column_major: bool) -> Tensor:
    if column_major:
        return torch.empty(columns, rows, dtype=dtype, device=device).T
    return torch.empty(rows, columns, dtype=dtype, device=device)


def load_weights(loader: Loader, config: GraniteConfig) -> Weights:
    """Build every layer of `config` from the loader's checkpoint. A tied head shares the embedding's memory."""
    jobs: list[Callable[[], Any]] = [functools.partial(loader.weight, EMBEDDING)]
    jobs += [functools.partial(_layer, loader, config, f"model.layers.{index}.") for index in range(config.num_hidden_layers)]
    jobs += [functools.partial(loader.tensor, "model.norm.weight")]
    jobs += [] if config.tie_word_embeddings else [functools.partial(loader.weight, HEAD)]
    alone = loader.device.type != "cpu" or not loader.checkpoint.concurrent
    embed, *built = [job() for job in jobs] if alone else run(jobs)
    layers, (norm, *head) = built[: config.num_hidden_layers], built[config.num_hidden_layers :]
    return Weights(embed, layers, norm, head[0] if head else embed)


def _layer(loader: Loader, config: GraniteConfig, prefix: str) -> Layer:
    attention = prefix + "self_attn."
    parts: dict[str, Any] = dict(
        input_norm=loader.tensor(prefix + "input_layernorm.weight"),
        qkv=loader.weight(*(f"{attention}{name}_proj.weight" for name in "qkv")),
        o=loader.weight(attention + "o_proj.weight"),
        post_norm=loader.tensor(prefix + "post_attention_layernorm.weight"),
    )
    if not config.is_moe:
        gate_up = loader.weight(prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight")
        return Layer(**parts, gate_up=gate_up, down=loader.weight(prefix + "mlp.down_proj.weight"))
    return Layer(**parts, experts=_experts(loader, config, prefix))


def _experts(loader: Loader, config: GraniteConfig, prefix: str) -> Experts:
    moe, shared = prefix + "block_sparse_moe.", prefix + "shared_mlp."
    fused = moe + "input_linear.weight"
    names = (fused,) if fused in loader.checkpoint.tensors else (moe + "gate_exps.weight", moe + "up_exps.weight")
    fused_shared = shared + "input_linear.weight"
    halves = (shared + "gate_proj.weight", shared + "up_proj.weight")
    shared_names = (fused_shared,) if fused_shared in loader.checkpoint.tensors else halves
    router = moe + "router.layer.weight"
    stored = loader.checkpoint.tensors[router].format
    return Experts(
        loader.tensor(router, torch.float32 if stored == "float32" else None),
        loader.experts(*names),
        loader.experts(moe + "output_linear.weight"),
        loader.weight(*shared_names) if config.shared_intermediate_size else None,
        loader.weight(shared + "output_linear.weight") if config.shared_intermediate_size else None,
    )
