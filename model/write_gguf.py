"""Write a checkpoint, quantized, as a GGUF file that llama.cpp and this package read."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from granite_kernels import formats

from .checkpoint import Checkpoint
from .checkpoint.gguf_names import gguf_name, permute, permuted_heads
from .gguf_metadata import Pairs, architecture_of, config_pairs, tokenizer_pairs
from .tokenizer import load_tokenizer

_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SPLIT = {  # what GGUF stores in halves
    "block_sparse_moe.input_linear.weight": ("block_sparse_moe.gate_exps.weight", "block_sparse_moe.up_exps.weight"),
    "shared_mlp.input_linear.weight": ("shared_mlp.gate_proj.weight", "shared_mlp.up_proj.weight"),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of the file: `half` of the tensor `source`, which has `halves` of them along its rows."""

    name: str
    source: str
    shape: tuple[int, ...]
    format: str  # a block format or a dtype
    half: int = 0
    halves: int = 1

    @property
    def row_bytes(self) -> int:
        if self.format in formats.GGUF_NAMES:
            format = formats.get_gguf(self.format)
            return self.shape[-1] // format.block * format.block_bytes
        itemsize: int = getattr(torch, self.format).itemsize
        return self.shape[-1] * itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


def write_gguf(
    checkpoint: Checkpoint,
    plan: Mapping[str, str],
    quantization: str | None,
    path: Path,
    content: Callable[[Entry], Tensor],
    advance: Callable[[str], None],
) -> None:
    """Write the tensors of `checkpoint` to `path`, in the formats of `plan` or as they are, with configuration and tokenizer.

    content(entry) gives the bytes or values of a tensor, as `quantized` does; `advance` gets the name of each before. One is in
    memory at a time. `quantization` names the plan for the file's readers; None: nothing is quantized.
    """
    import gguf

    words = tokenizer_pairs(checkpoint, load_tokenizer(checkpoint))
    if words is None:
        warnings.warn(f"{checkpoint.path}: GGUF has no words for its tokenizer.json, so the file holds no tokenizer", stacklevel=2)
    writer = gguf.GGUFWriter(path, architecture_of(checkpoint.config))
    try:
        _add_pairs(writer, {"general.name": checkpoint.path.stem, **config_pairs(checkpoint.config, quantization), **(words or {})})
        entries = list(_entries(checkpoint, plan))
        for entry in entries:
            kind = gguf.GGMLQuantizationType[_KINDS.get(entry.format, entry.format.upper())]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            advance(entry.source)
            writer.write_tensor_data(content(entry).contiguous().view(torch.uint8).cpu().numpy())
    finally:
        writer.close()


def _entries(checkpoint: Checkpoint, plan: Mapping[str, str]) -> Iterator[Entry]:
    for name, info in checkpoint.tensors.items():
        format = plan.get(name, "float32" if len(info.shape) == 1 or name.endswith("router.layer.weight") else info.format)
        halves = next((halves for stem, halves in _SPLIT.items() if name.endswith(stem)), None)
        if halves is None:
            yield Entry(gguf_name(name), name, info.shape, format)
            continue
        prefix = name[: name.index(halves[0].split(".")[0])]
        *experts, rows, columns = info.shape
        for half, stem in enumerate(halves):
            yield Entry(gguf_name(prefix + stem), name, (*experts, rows // 2, columns), format, half, 2)


def quantized(checkpoint: Checkpoint, entry: Entry, device: torch.device) -> Tensor:
    """Bytes or values of the entry, made on `device`, its rows in the file's order."""
    data = checkpoint.read(entry.source).data.to(device)
    if entry.halves > 1:
        data = data.unflatten(-2, (entry.halves, -1)).select(-3, entry.half)
    if entry.format in formats.GGUF_NAMES:
        format, shape = formats.get_gguf(entry.format), (math.prod(entry.shape[:-1]), entry.shape[-1])
        data = format.blocks(format.quantize(data.reshape(shape)), shape)
    else:
        data = data.to(getattr(torch, entry.format))
    heads = permuted_heads(entry.source, checkpoint.config)
    return permute(data, heads) if heads else data


def _add_pairs(writer: Any, pairs: Pairs) -> None:
    for key, value in pairs.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_string)(key, value)
