"""compressed-tensors: pack-quantized (4 and 8 bits), int-quantized and float-quantized (FP8) weights.

    pack-quantized   weight_packed int32 [rows, columns * bits / 32], element k of a word at bit bits * k, stored as q + 2^(bits - 1);
                     weight_scale [rows, groups]; weight_shape; weight_zero_point int32 [rows * bits / 32, groups], packed along the rows
    int-quantized    weight int8 [rows, columns]; weight_scale [rows, groups] or [1]; weight_zero_point int8
    float-quantized  weight float8_e4m3fn [rows, columns]; weight_scale [rows, 1], [1], or one a block of rows and columns

    value = (q - zero_point) * scale

Source: github.com/vllm-project/compressed-tensors. Bits and groups are taken from the tensors' shapes; the configuration says what
can't be seen there. Activations that a checkpoint asks to quantize stay in the model's dtype: that is said once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from granite_kernels.errors import GraniteError

from .base import DENSE_FORMATS, TensorInfo
from .prequantized import (
    INTEGERS,
    WORDS,
    Coded,
    Infos,
    Prequantized,
    Read,
    Tensors,
    act_order,
    check_groups,
    check_shape,
    check_type,
    flat_rows,
    format_for,
    unpack_words,
)

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
STRATEGIES = ("channel", "group", "tensor", "block")
EIGHT_BITS = ("i8", "f8_e4m3")


class CompressedTensors(Prequantized):
    """See the module's text."""

    kinds = (
        "weight",
        *(f"weight_{kind}" for kind in ("packed", "scale", "shape", "zero_point", "g_idx")),
        *(f"{side}_{kind}" for side in ("input", "output") for kind in ("scale", "zero_point")),
    )

    types: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight_packed": WORDS,
        "weight_scale": DENSE_FORMATS,
        "weight_shape": INTEGERS,
        "weight_zero_point": ("i32", "i8", "f8_e4m3"),
        "weight_g_idx": INTEGERS,
    }

    def __init__(self, settings: Mapping[str, Any], path: Path, dtype: torch.dtype) -> None:
        super().__init__(settings, path, dtype)
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            self.refuse(f"config_groups {str(groups)[:60]!r}", "an object of groups of modules")
        for found in (settings, *groups.values()):
            if found.get("format") not in (None, *FORMATS):
                self.refuse(f"the format {found['format']!r}", f"one of {', '.join(FORMATS)}")
        sparsity = settings.get("sparsity_config") or {}
        if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
            self.refuse(f"sparsity_config {str(sparsity)[:60]!r}", "none: sparse weights aren't supported")
        if settings.get("transform_config"):
            self.refuse("transform_config", "none: transforms of activations aren't supported")
        for name, group in groups.items():
            self._check_weights(name, group.get("weights"))
        if any(group.get("input_activations") or group.get("output_activations") for group in groups.values()):
            self.say("asks for quantized activations; they stay in the model's dtype here, which loses less")
        if settings.get("kv_cache_scheme"):
            self.say("asks for a quantized KV cache; it stays in the model's dtype here")

    def _check_weights(self, name: str, weights: Any) -> None:
        if not isinstance(weights, Mapping):
            self.refuse(f"{name} without weights", "weights in each group")
        kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
        if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
            self.refuse(f"weights of type {kind!r} with {bits} bits in {name}", "int with 4 or 8 bits, or float with 8")
        if strategy not in (None, *STRATEGIES):
            self.refuse(f"the strategy {strategy!r} in {name}", f"one of {', '.join(STRATEGIES)}")

    def is_packed(self, infos: Infos) -> bool:
        return "weight_packed" in infos or ("weight" in infos and infos["weight"].format in EIGHT_BITS)

    def shape(self, module: str, infos: Infos, read: Read) -> tuple[int, ...]:
        weight = infos.get("weight_packed", infos.get("weight"))
        assert weight is not None
        absent = {"weight_scale", *(("weight_shape",) if "weight_packed" in infos else ())} - infos.keys()
        if absent:
            raise GraniteError(f"{weight.file}: {module} is packed, but its {' and '.join(sorted(absent))} is missing")
        if "weight_packed" in infos:
            check_shape(module, infos["weight_shape"], (2,), (3,))
            check_type(infos.get("weight_zero_point", weight), WORDS)
        shape = tuple(read(infos["weight_shape"]).tolist()) if "weight_packed" in infos else weight.shape
        if len(shape) < 2 or min(shape) < 1:
            raise GraniteError(f"{weight.file}: {module} has the shape {list(shape)}; expected [rows, columns]")
        rows, columns, scale = flat_rows(shape), shape[-1], infos["weight_scale"]
        zero_rows: tuple[int, ...] = scale.shape[:-1]
        if "weight_packed" in infos:
            words = -(-columns // 8), -(-columns // 4)
            check_shape(module, weight, *((rows, count) for count in words))
            zero_rows = (-(-rows * _bits(infos, columns) // 32),)
        if not _by_blocks(infos, shape):
            groups = _groups(scale)
            check_groups(scale, groups, columns)
            check_shape(module, scale, (), (1,), (1, 1), (rows, groups), (*shape[:-1], groups))
            if "weight_zero_point" in infos:
                check_shape(module, infos["weight_zero_point"], (*zero_rows, groups), (groups,))
        if "weight_g_idx" in infos:
            check_shape(module, infos["weight_g_idx"], (columns,))
        return shape

    def format(self, infos: Infos, shape: tuple[int, ...], read: Read) -> str | None:
        columns, groups = shape[-1], _groups(infos["weight_scale"])
        index = read(infos["weight_g_idx"]) if "weight_g_idx" in infos else None
        if _by_blocks(infos, shape) or act_order(index, columns, groups) is not None:
            return None
        found = format_for(columns, groups, _bits(infos, columns), zero="weight_zero_point" in infos)
        if "weight" in infos and infos["weight"].format == "f8_e4m3":
            return "fp8" if found == "int8" else None
        return found

    def decode(self, tensors: Tensors, shape: tuple[int, ...]) -> Coded:
        rows, columns = flat_rows(shape), shape[-1]
        scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
        if "weight_packed" in tensors:
            packed = tensors["weight_packed"]
            bits, steps = 4 if packed.shape[1] == -(-columns // 8) else 8, _each_row(scale, rows)
            order = act_order(tensors.get("weight_g_idx"), columns, steps.shape[1])
            zero = None if zero is None else unpack_words(zero.T, bits)[:, :rows].T
            return Coded(unpack_words(packed, bits)[:, :columns], steps, zero, bits, order)
        codes = tensors["weight"].view(rows, columns)
        if scale.dim() == len(shape) == 2 and scale.shape[0] != rows and scale.numel() > 1:
            return Coded(codes, _each_value(scale, rows, columns))
        if codes.dtype == torch.int8:
            codes = codes.view(torch.uint8).bitwise_xor(128)
            zero = None if zero is None else _each_row(zero, rows).to(torch.int8).view(torch.uint8).bitwise_xor(128)
        else:
            zero = None  # float8 is symmetric
        return Coded(codes, _each_row(scale, rows), zero)


def _bits(infos: Infos, columns: int) -> int:
    return 4 if "weight_packed" in infos and infos["weight_packed"].shape[-1] == -(-columns // 8) else 8


def _groups(scale: TensorInfo) -> int:
    return scale.shape[-1] if scale.shape else 1


def _by_blocks(infos: Infos, shape: tuple[int, ...]) -> bool:
    scale = infos["weight_scale"].shape
    return "weight" in infos and len(shape) == len(scale) == 2 and scale[0] != shape[0] and scale != (1, 1)


def _each_row(scale: Tensor, rows: int) -> Tensor:
    """Scales of any of the allowed shapes as [rows, groups]."""
    return scale.reshape(-1, scale.shape[-1] if scale.dim() else 1).expand(rows, -1)


def _each_value(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Scales of blocks as float32 [rows, columns]."""
    high, wide = -(-rows // scale.shape[0]), -(-columns // scale.shape[1])
    return scale.float().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
