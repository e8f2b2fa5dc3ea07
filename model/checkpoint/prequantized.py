"""Checkpoints of other quantizers, normalized into our formats: what their readers share.

A reader (compressed_tensors.py, gptq.py) takes the tensors of each packed module out of a folder's table, puts one `<module>.weight` in
their place, and reads it as codes beside scales. A format of ours then holds the same values, bit for bit, narrower groups repeating
a wider group's scale. What none holds is dequantized to the configuration's dtype, with one warning that says so.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from granite_kernels import formats
from granite_kernels.errors import GraniteError

from .base import Stored, TensorInfo
from .finite import count_non_finite, non_finite_error

Infos = Mapping[str, TensorInfo]  # of one module, by the last part of their names
Tensors = Mapping[str, Tensor]
Read = Callable[[TensorInfo], Tensor]
FORMATS = ("int8", "q8_0", "fp8", *formats.INT4_NAMES)  # what a weight may become
ROUNDED = "granite_kernels_int8"  # a config.json's list of dense weights that are int8 here: others read no packed embedding
WORDS = ("i32",)
INTEGERS = ("i32", "i64")
INT4_GROUPS = (128, 64, 32)
HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Coded:
    """scale * (code - zero). codes uint8 [rows, columns] of `bits` bits, or float8; scale and zero [rows, groups].

    zero None is the middle of the codes. Column c belongs to group order[c], without an order to group c // (columns / groups).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    bits: int = 8
    order: Tensor | None = None

    def values(self) -> Tensor:
        """float32 [rows, columns]"""
        columns, groups = self.codes.shape[1], self.scale.shape[1]
        group = torch.arange(columns) // (columns // groups) if self.order is None else self.order.long()
        values = self.codes.float()
        if self.codes.dtype == torch.uint8:
            values -= float(1 << self.bits - 1) if self.zero is None else self.zero.float()[:, group]
        return values.mul_(self.scale.float()[:, group])


class Prequantized(abc.ABC):
    """The packed modules of a checkpoint, which `path`, its config.json, describes by `settings`; `dtype` is the configuration's."""

    kinds: tuple[str, ...]  # the last parts of the names of a packed module's tensors
    types: ClassVar[Mapping[str, tuple[str, ...]]]  # the types that they may have, where only some make sense

    def __init__(self, settings: Mapping[str, Any], path: Path, dtype: torch.dtype) -> None:
        self.settings, self.path, self.dtype = settings, path, dtype
        self.rounded: frozenset[str] = frozenset()  # the names in ROUNDED
        self._modules: dict[str, Infos] = {}
        self._said_dense, self._saying = False, threading.Lock()

    @abc.abstractmethod
    def is_packed(self, infos: Infos) -> bool:
        """Whether these tensors of one module are a packed weight."""

    @abc.abstractmethod
    def shape(self, module: str, infos: Infos, read: Read) -> tuple[int, ...]:
        """The shape of a packed weight, the shape of every tensor having been checked. Raises GraniteError."""

    @abc.abstractmethod
    def format(self, infos: Infos, shape: tuple[int, ...], read: Read) -> str | None:
        """The format that the weight gets, as far as the table and its order tell; None where it will be dense."""

    @abc.abstractmethod
    def decode(self, tensors: Tensors, shape: tuple[int, ...]) -> Coded:
        """A packed weight as codes beside scales, the rows of all experts stacked."""

    def normalize(self, found: Infos, read: Read) -> dict[str, TensorInfo]:
        """The table with one weight in place of each packed module's tensors."""
        table: dict[str, TensorInfo] = {}
        modules: dict[str, dict[str, TensorInfo]] = {}
        for name, info in found.items():
            module, _, kind = name.rpartition(".")
            if kind in self.kinds:
                modules.setdefault(module, {})[kind] = info
            else:
                table[name] = info
        for module, infos in modules.items():
            if not self.is_packed(infos):
                table |= {f"{module}.{kind}": info for kind, info in infos.items()}
                continue
            for kind, info in infos.items():
                check_type(info, self.types.get(kind, (info.format,)))
            name, first = f"{module}.weight", next(iter(infos.values()))
            shape = self.shape(module, infos, read)
            format = self.format(infos, shape, read) or str(self.dtype).removeprefix("torch.")
            table[name] = TensorInfo(name, shape, format, sum(info.nbytes for info in infos.values()), first.file, name)
            self._modules[name] = infos
        for name in self.rounded & table.keys():
            self._modules[name] = {"weight": table[name]}
            table[name] = dataclasses.replace(table[name], format="int8")
        return table

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def read(self, info: TensorInfo, read: Read, *, check_finite: bool) -> Stored:
        """The weight of a packed module, in a format of ours or dense in `dtype`."""
        tensors = {kind: read(part) for kind, part in self._modules[info.name].items()}
        for kind, tensor in tensors.items():
            if check_finite and tensor.is_floating_point():
                bad = count_non_finite(tensor.float() if tensor.element_size() == 1 else tensor)
                if bad:
                    raise non_finite_error(f"{info.file}: {info.name.removesuffix('weight')}{kind}", bad, f"values of {tensor.numel():,}")
        if info.name in self.rounded:
            int8 = formats.get_coded("int8")
            codes, *metadata = int8.codes(int8.quantize(tensors["weight"]), info.shape)
            return Stored("int8", codes, info.shape, tuple(metadata))
        coded = self.decode(tensors, info.shape)
        groups = coded.scale.shape[1]
        if coded.order is not None and not 0 <= int(coded.order.min()) <= int(coded.order.max()) < groups:
            raise GraniteError(
                f"{info.file}: the g_idx of {info.name} names groups out of 0 .. {groups - 1}; download the checkpoint again"
            )
        stored = None if coded.order is not None else fitted(coded, info.shape)
        if stored is not None:
            return stored
        dense = str(self.dtype).removeprefix("torch.")
        with self._saying:
            first, self._said_dense = not self._said_dense, True
        if first:
            self.say(f"{_described(coded)} have no format here: such weights are dequantized to {dense} and take its memory")
        return Stored(dense, coded.values().to(self.dtype).view(info.shape), info.shape)

    def refuse(self, what: str, expected: str) -> NoReturn:
        raise GraniteError(f"{self.path}: quantization_config says {what}; expected {expected}")

    def say(self, message: str) -> None:
        warnings.warn(f"{self.path}: {message}", stacklevel=2)


def fitted(coded: Coded, shape: tuple[int, ...]) -> Stored | None:
    """The weight in the format that holds the same values; None if there is none."""
    codes, scale, zero = coded.codes, coded.scale, coded.zero
    rows, columns = codes.shape
    if zero is not None and bool((zero == 1 << coded.bits - 1).all()):
        zero = None
    format = format_for(columns, scale.shape[1], coded.bits, zero=zero is not None)
    if format is None or (codes.dtype == torch.float8_e4m3fn and format != "int8"):
        return None
    if codes.dtype == torch.float8_e4m3fn:
        return Stored("fp8", codes, shape, (scale.float(),))
    if format == "int8":
        return Stored(format, codes.bitwise_xor(128).view(torch.int8), shape, (scale.float(),))
    times = columns // scale.shape[1] // formats.get(format).block
    if format == "q8_0":
        half = scale.half()
        if not torch.equal(half.float(), scale.float()):
            return None
        d = half.repeat_interleave(times, 1)[..., None].view(torch.uint8)
        blocks = torch.cat((d, codes.bitwise_xor(128).view(rows, -1, 32)), -1)
        return Stored(format, blocks.view(*shape[:-1], -1), shape)
    if scale.dtype not in HALVES:
        return None
    metadata = (scale,) if zero is None else (scale, zero)
    return Stored(format, codes, shape, tuple(values.repeat_interleave(times, 1) for values in metadata))


def format_for(columns: int, groups: int, bits: int, *, zero: bool) -> str | None:
    """The format for codes of `bits` bits with `groups` scales a row, with zero points or without; None if there is none."""
    width = columns // groups
    if bits == 4:
        ours = next((group for group in INT4_GROUPS if width % group == 0), None)
        return None if ours is None else f"int4_g{ours}{'_zero' if zero else ''}"
    if zero or columns % 32:
        return None
    return "int8" if groups == 1 else "q8_0" if width % 32 == 0 else None


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] of fields of 4 or 8 bits, lowest first -> uint8 [rows, n * 32 / bits]."""
    data = words.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data.bitwise_right_shift(4)), -1).flatten(1)


def act_order(index: Tensor | None, columns: int, groups: int) -> Tensor | None:
    """The group int64 [columns] of each column where `index` isn't just c // (columns / groups); else None."""
    if index is None or torch.equal(index.long(), torch.arange(columns) // (columns // groups)):
        return None
    return index.long()


def check_type(info: TensorInfo, expected: tuple[str, ...]) -> None:
    """Raise GraniteError where a tensor of a packed module has none of the expected types, or no values."""
    if info.format not in expected or 0 in info.shape:
        found = f"the type {info.format} and the shape {list(info.shape)}"
        raise GraniteError(f"{info.file}: {info.stored_name} has {found}; expected values of type {' or '.join(expected)}")


def check_shape(module: str, info: TensorInfo, *expected: tuple[int, ...]) -> None:
    """Raise GraniteError where a tensor of a packed module has none of the expected shapes."""
    if info.shape not in expected:
        wanted = " or ".join(dict.fromkeys(str(list(shape)) for shape in expected))
        raise GraniteError(
            f"{info.file}: {info.stored_name} has the shape {list(info.shape)}; expected {wanted}, "
            f"as the other tensors of {module} imply, so download the checkpoint again"
        )


def check_groups(info: TensorInfo, groups: int, columns: int) -> None:
    """Raise GraniteError where `groups` scales can't share a row of `columns` evenly."""
    if groups < 1 or columns % groups:
        raise GraniteError(f"{info.file}: {info.stored_name} has {groups} groups; expected a divisor of {columns}, the columns of a row")


def flat_rows(shape: tuple[int, ...]) -> int:
    """Rows of a weight, those of all experts in a stack of them."""
    return math.prod(shape[:-1])


def _described(coded: Coded) -> str:
    if coded.order is not None:
        return "weights with columns in act-order (g_idx)"
    kind = "FP8" if coded.codes.dtype == torch.float8_e4m3fn else f"{coded.bits}-bit"
    signs = " with zero points" if coded.zero is not None else ""
    return f"{kind} weights in groups of {coded.codes.shape[1] // coded.scale.shape[1]} columns{signs}, scales in {coded.scale.dtype},"
