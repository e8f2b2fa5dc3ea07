"""Write a checkpoint, quantized to int8 or int4, as safetensors in the layout of compressed-tensors ("pack-quantized").

The embedding is written as it is, since no other reader takes a packed one, and the configuration says that it is int8 here: its
rounding is repeated when it is loaded.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from granite_kernels import formats

from .checkpoint import Checkpoint
from .checkpoint.folder import CONFIG, INDEX, WEIGHTS, read_json
from .checkpoint.layout import EMBEDDING, HEAD
from .checkpoint.prequantized import ROUNDED

SHARD = 2_000_000_000  # bytes of tensors in a file, about
GENERATION = "generation_config.json"


def write_safetensors(
    checkpoint: Checkpoint,
    plan: Mapping[str, str],
    folder: Path,
    device: torch.device,
    advance: Callable[[str], None],
    *,
    shard: int = SHARD,
) -> None:
    """Quantize the tensors of `plan` on `device` and write all into `folder`, with configuration and tokenizer beside."""
    from safetensors.torch import save_file

    names: list[list[str]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if pending:
            names.append(list(pending))
            save_file(pending, folder / f"part-{len(names)}.safetensors", metadata={"format": "pt"})
            pending.clear()

    total = 0
    for name in checkpoint.tensors:
        advance(name)
        for stored, tensor in _tensors(checkpoint, name, plan.get(name), device):
            if pending and sum(each.nbytes for each in pending.values()) + tensor.nbytes > shard:
                flush()
            pending[stored] = tensor.cpu().contiguous()
            total += tensor.nbytes
    flush()
    files = [WEIGHTS] if len(names) == 1 else [f"model-{index + 1:05d}-of-{len(names):05d}.safetensors" for index in range(len(names))]
    for index, file in enumerate(files):
        (folder / f"part-{index + 1}.safetensors").rename(folder / file)
    if len(files) > 1:
        table = {name: file for file, stored in zip(files, names, strict=True) for name in stored}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=2))
    for beside in (*checkpoint.tokenizer_files, *checkpoint.path.glob(GENERATION)):
        shutil.copyfile(beside, folder / beside.name)
    settings: dict[str, Any] = {"quantization_config": quantization_config(plan, checkpoint.tensors)}
    if plan.get(EMBEDDING) == "int8":
        settings[ROUNDED] = [EMBEDDING]
    config = read_json(checkpoint.path / CONFIG) | settings
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def quantization_config(plan: Mapping[str, str], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of compressed-tensors for `plan`: its commonest format for every linear layer, the others by name."""
    modules: dict[str, list[str]] = {}
    packed = {name: format for name, format in plan.items() if name != EMBEDDING}
    for name, format in packed.items():
        modules.setdefault(format, []).append(name.removesuffix(".weight"))
    commonest = max(modules, key=lambda format: len(modules[format]))
    groups = {}
    for index, (format, found) in enumerate(sorted(modules.items(), key=lambda item: item[0] != commonest)):
        weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
        if format != "int8":
            weights |= {"num_bits": 4, "strategy": "group", "group_size": formats.get(format).block}
        targets = ["Linear", *(name for name in found if not name.endswith("_proj"))] if format == commonest else found
        groups[f"group_{index}"] = {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
    dense = [name.removesuffix(".weight") for name, info in tensors.items() if len(info.shape) > 1 and name not in packed]
    dense += [] if HEAD in tensors else [HEAD.removesuffix(".weight")]  # tied: a linear layer to others, with no tensor of its own
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        "kv_cache_scheme": None,
    }


def _tensors(checkpoint: Checkpoint, name: str, format: str | None, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """What the file holds for the tensor `name`."""
    stored = checkpoint.read(name)
    if format is None or name == EMBEDDING:
        yield name, stored.data
        return
    shape = (math.prod(stored.shape[:-1]), stored.shape[-1])
    kind = formats.get_coded(format)
    codes, scale = kind.codes(kind.quantize(stored.data.to(device).view(shape)), shape)
    yield f"{name}_packed", words(codes)
    yield f"{name}_scale", scale
    yield f"{name}_shape", torch.tensor(stored.shape)


def words(codes: Tensor) -> Tensor:
    """Signed int8 or unsigned 4-bit codes [rows, columns] as int32 words, lowest field first, signed ones with 128 added."""
    if codes.dtype == torch.int8:
        return codes.view(torch.uint8).bitwise_xor(128).view(torch.int32)
    pairs = codes.unflatten(1, (-1, 2))
    return pairs[..., 1].bitwise_left_shift(4).bitwise_or_(pairs[..., 0]).view(torch.int32)
