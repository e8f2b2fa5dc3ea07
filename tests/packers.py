"""The published packings of other quantizers, written out field by field: what the readers of checkpoints are held against.

Each gives the tensors of one module, by the last part of their names, and the values float32 [rows, columns] that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny

Module = tuple[dict[str, Tensor], Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(fields: np.ndarray, bits: int) -> Tensor:
    """Unsigned fields [rows, n] in 32-bit words along the last axis, the first field lowest; the last word filled with zeros."""
    rows, count = fields.shape
    packed = np.zeros((rows, -(-count * bits // 32)), np.uint32)
    for column in range(count):
        place = column * bits
        packed[:, place // 32] |= fields[:, column].astype(np.uint32) << np.uint32(place % 32)
    return torch.from_numpy(packed.view(np.int32).copy())


def numbers(low: int, high: int, *shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, shape)


def scales(rows: int, groups: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (0.002 + 0.02 * torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed))).to(dtype)


def meaning(codes: np.ndarray, zero: np.ndarray | int, scale: Tensor, group: np.ndarray) -> Tensor:
    offset = zero if isinstance(zero, int) else zero[:, group]
    return torch.from_numpy((codes - offset).astype(np.float32)) * scale.float()[:, torch.from_numpy(group)]


def pack_quantized(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group: int | None = 64,
    zero: bool = False,
    order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    scale: float | None = None,
    seed: int = 0,
) -> Module:
    """compressed-tensors "pack-quantized": signed codes stored with 2^(bits - 1) added. `scale`: one float32 for all groups."""
    groups, middle = columns // (group or columns), 1 << bits - 1
    codes = numbers(-middle, middle - 1, rows, columns, seed=seed)
    steps = scales(rows, groups, dtype, seed) if scale is None else torch.full((rows, groups), scale)
    points = numbers(-middle, middle - 1, rows, groups, seed=seed + 1)
    index = np.random.default_rng(seed).permutation(columns) // (columns // groups) if order else np.arange(columns) // (columns // groups)
    tensors = {"weight_packed": words(codes + middle, bits), "weight_scale": steps, "weight_shape": torch.tensor([rows, columns])}
    if zero:
        tensors["weight_zero_point"] = words((points + middle).T, bits).T.contiguous()
    if order:
        tensors["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
    return tensors, meaning(codes, points if zero else 0, steps, index)


def int_quantized(rows: int, columns: int, *, group: int | None = None, zero: bool = False, tensor: bool = False, seed: int = 0) -> Module:
    """compressed-tensors "int-quantized": int8 codes as they are."""
    groups = columns // (group or columns)
    codes, scale = numbers(-128, 127, rows, columns, seed=seed), scales(1 if tensor else rows, groups, torch.bfloat16, seed)
    points = numbers(-128, 127, rows, groups, seed=seed + 1)
    tensors = {"weight": torch.from_numpy(codes.astype(np.int8)), "weight_scale": scale[0] if tensor else scale}
    if zero:
        tensors["weight_zero_point"] = torch.from_numpy(points.astype(np.int8))
    return tensors, meaning(codes, points if zero else 0, scale.expand(rows, -1), np.arange(columns) // (columns // groups))


def float_quantized(rows: int, columns: int, *, kind: str = "channel", seed: int = 0) -> Module:
    """compressed-tensors "float-quantized": float8 e4m3, a scale for each row, for the tensor or for blocks of 64 x 64."""
    codes = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul(60).to(torch.float8_e4m3fn)
    if kind == "block":
        scale = scales(rows // 64, columns // 64, torch.bfloat16, seed)
        return {"weight": codes, "weight_scale": scale}, codes.float() * torch.kron(scale.float(), torch.ones(64, 64))
    scale = scales(rows if kind == "channel" else 1, 1, torch.bfloat16, seed)
    stored = scale if kind == "channel" else scale[0]
    return {"weight": codes, "weight_scale": stored, "input_scale": torch.ones(1)}, codes.float() * scale.float()


def gptq(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group: int | None = 64,
    sym: bool = True,
    version: int = 1,
    order: bool = False,
    seed: int = 0,
) -> Module:
    """GPTQ: transposed, zero points less one in version 1."""
    groups, top = columns // (group or columns), (1 << bits) - 1
    codes, scale = numbers(0, top, rows, columns, seed=seed), scales(rows, groups, torch.float16, seed)
    points = np.full((rows, groups), 1 << bits - 1) if sym else numbers(1, top, rows, groups, seed=seed + 1)
    index = np.random.default_rng(seed).permutation(columns) // (columns // groups) if order else np.arange(columns) // (columns // groups)
    tensors = {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words((points - (version == 1)).T, bits),
        "scales": scale.T.contiguous(),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
        "bias": torch.zeros(rows, dtype=torch.float16),
    }
    return tensors, meaning(codes, points, scale, index)


def awq(rows: int, columns: int, *, group: int = 64, seed: int = 0) -> Module:
    """AWQ "gemm": nibble k of word c holds row 8c + AWQ_ORDER[k]."""
    groups = columns // group
    codes, scale = numbers(0, 15, rows, columns, seed=seed), scales(rows, groups, torch.float16, seed)
    points = numbers(0, 15, rows, groups, seed=seed + 1)
    shuffled = [8 * word + place for word in range(rows // 8) for place in AWQ_ORDER]
    tensors = {"qweight": words(codes.T[:, shuffled], 4), "qzeros": words(points.T[:, shuffled], 4), "scales": scale.T.contiguous()}
    return tensors, meaning(codes, points, scale, np.arange(columns) // group)


def folder(
    path: Path, make: Callable[..., Module] | None, settings: dict[str, Any] | None, **options: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A granite of one layer in `path`, its matrices made by `make`; and the values of all its tensors."""
    config = tiny.granite_config(num_hidden_layers=1, model_type="granite", torch_dtype="float32")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(5)
    values = {
        "model.embed_tokens.weight": 0.3 * torch.randn(config["vocab_size"], hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        values[f"model.layers.0.{name}.weight"] = torch.ones(hidden)
    stored = dict(values)
    shapes = {"self_attn.q": (hidden, hidden), "self_attn.k": (64, hidden), "self_attn.v": (64, hidden), "self_attn.o": (hidden, hidden)}
    shapes |= {"mlp.gate": (inner, hidden), "mlp.up": (inner, hidden), "mlp.down": (hidden, inner)}
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        module = f"model.layers.0.{name}_proj"
        tensors, meant = make(rows, columns, seed=seed, **options) if make else ({}, torch.randn(rows, columns, generator=generator) / 16)
        values[f"{module}.weight"] = meant
        stored |= {f"{module}.{kind}": tensor for kind, tensor in (tensors or {"weight": meant}).items()}
    path.mkdir(exist_ok=True)
    save_file(stored, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**config, **({"quantization_config": settings} if settings else {})}))
    return path, values
