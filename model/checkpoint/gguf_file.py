"""The header of a GGUF file, read through a mapping, with every length held against the bytes that remain.

A header is input from strangers: counts of 2^63, strings longer than the file and arrays in arrays are refused before
anything is allocated for them, and the work is bounded by limits that no real model comes near.

Layout (little-endian): magic, version u32, tensors u64, pairs u64; pairs of key, type u32, value; per tensor name,
n_dims u32, dims u64 (innermost first), type u32, offset u64; then the data, aligned.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from granite_kernels.errors import GraniteError

from .base import DENSE_FORMATS
from .finite import SCALE_OFFSETS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DENSE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SUPPORTED = (*DENSE_FORMATS, *SCALE_OFFSETS)
LARGEST_NAME = 1 << 10  # bytes; keys and tensors have names of 60
LARGEST_STRING = 1 << 26  # bytes; chat templates have 0.1 MB
MOST_ELEMENTS = 1 << 22  # of all arrays; a vocabulary of 128,256 with its merges has 0.7 million
MOST_ENTRIES = 1 << 16  # pairs or tensors; a model of 40 layers has 362 tensors

_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 10: "u8", 11: "i8", 12: "f8"}
_BOOL, _STRING, _ARRAY, _U32 = 7, 8, 9, 4
_U64_STRUCT = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is logical, outermost first; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A mapped file: `data` is all of it, uint8 [bytes]; arrays in `metadata` are lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: Tensor

    def blocks(self, tensor: GgufTensor) -> Tensor:
        """The bytes of a tensor, uint8 [nbytes], mapped."""
        return self.data[tensor.offset : tensor.offset + tensor.nbytes]


def read_gguf(path: Path) -> GgufFile:
    """Map `path` and read its header. Raises GraniteError for whatever isn't a sound GGUF file of version 2 or 3."""
    try:
        size = path.stat().st_size
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0).byte()
    except (OSError, RuntimeError) as error:
        raise GraniteError(f"{path}: can't be mapped: {error}; check its permissions") from error
    reader = _Reader(path, data.numpy().data)
    _check_start(reader)
    tensor_count, pair_count = reader.integer("Q", "the number of tensors"), reader.integer("Q", "the number of pairs")
    reader.bound(pair_count, MOST_ENTRIES, 13, "the number of key-value pairs")
    reader.bound(tensor_count, MOST_ENTRIES, 32, "the number of tensors")
    metadata, alignment = _pairs(reader, pair_count)
    tensors = [_tensor(reader) for _ in range(tensor_count)]
    start = -(-reader.position // alignment) * alignment
    return GgufFile(path, metadata, _placed(reader, tensors, start, alignment), data)


class _Reader:
    """A position in the mapped file; every read says what it is for, so that an error can."""

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path, self.buffer, self.size = path, buffer, len(buffer)
        self.position = 0
        self.elements = 0

    def error(self, found: str, expected: str) -> GraniteError:
        return GraniteError(f"{self.path} ({self.size:,} bytes): {found}; expected {expected}; download or convert it again")

    def need(self, count: int, what: str) -> int:
        """Move on by `count` bytes and return where they start."""
        start = self.position
        if count > self.size - start:
            raise self.error(f"{what} takes {count:,} bytes at byte {start:,}", f"at most the {self.size - start:,} that remain")
        self.position = start + count
        return start

    def bound(self, count: int, most: int, each: int, what: str) -> None:
        """Hold a count against a limit, and against what remains if each entry has at least `each` bytes."""
        fit = min(most, (self.size - self.position) // each)
        if count > fit:
            raise self.error(f"{what} is {count:,} at byte {self.position:,}", f"at most {fit:,}")

    def integer(self, code: str, what: str) -> int:
        start = self.need(struct.calcsize(code), what)
        value: int = struct.unpack_from("<" + code, self.buffer, start)[0]
        return value

    def string(self, most: int, what: str) -> str:
        length = self.integer("Q", f"the length of {what}")
        self.bound(length, most, 1, f"the length of {what}")
        start = self.need(length, what)
        return self.text(start, start + length, what)

    def name(self, what: str) -> str:
        found = self.string(LARGEST_NAME, what)
        if not found.isprintable():  # it is going to be a part of messages
            raise self.error(f"{what} is {found[:80]!r}", "printable characters")
        return found

    def text(self, start: int, end: int, what: str) -> str:
        try:
            return str(self.buffer[start:end], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at byte {start:,} isn't UTF-8 ({error.reason})", "UTF-8 text") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(LARGEST_STRING, key)
        if kind == _ARRAY:
            return self.array(key)
        return self.numbers(kind, 1, key)[0]

    def array(self, key: str) -> list[Any]:
        kind = self.integer("I", f"the element type of {key}")
        if kind == _ARRAY:
            raise self.error(f"{key} is an array of arrays", "an array of numbers or strings")
        count = self.integer("Q", f"the length of {key}")
        self.bound(count, MOST_ELEMENTS - self.elements, 8 if kind == _STRING else 1, f"the length of {key}")
        self.elements += count
        return self.strings(count, key) if kind == _STRING else self.numbers(kind, count, key)

    def numbers(self, kind: int, count: int, key: str) -> list[Any]:
        if kind != _BOOL and kind not in _SCALARS:
            raise self.error(f"{key} has the value type {kind}", "a type from 0 to 12")
        dtype = np.dtype("<" + _SCALARS.get(kind, "u1"))
        start = self.need(count * dtype.itemsize, key)
        values = np.frombuffer(self.buffer, dtype, count, start)
        if kind == _BOOL:
            if count and values.max() > 1:
                raise self.error(f"{key} is the boolean {values.max()}", "0 or 1")
            values = values.astype(bool)
        return list(values.tolist())

    def strings(self, count: int, key: str) -> list[str]:
        # a vocabulary has 100,000 of them: one plain loop, and one check an entry
        found, buffer, position, end = [], self.buffer, self.position, self.size
        unpack = _U64_STRUCT.unpack_from
        for index in range(count):
            start = position + 8
            position = start + unpack(buffer, position)[0] if start <= end else end + 1
            if position > end:
                raise self.error(f"entry {index} of {key} ends after the file, at byte {position:,}", f"at most byte {end:,}")
            try:
                found.append(str(buffer[start:position], "utf-8"))
            except UnicodeDecodeError:
                self.text(start, position, f"entry {index} of {key}")
        self.position = position
        return found


def _check_start(reader: _Reader) -> None:
    magic = bytes(reader.buffer[:4])
    if magic != MAGIC:
        raise reader.error(f"starts with {magic!r}", f"a GGUF file, which starts with {MAGIC!r}")
    reader.position = 4
    version = reader.integer("I", "the version")
    if version and version & 0xFFFF == 0:
        raise reader.error(f"is big-endian (its version reads {version:#010x})", "a little-endian GGUF file")
    if version not in VERSIONS:
        raise reader.error(f"has version {version}", f"version {' or '.join(map(str, VERSIONS))}")


def _pairs(reader: _Reader, count: int) -> tuple[dict[str, Any], int]:
    metadata: dict[str, Any] = {}
    alignment = 32
    for _ in range(count):
        key = reader.name("a key")
        if key in metadata:
            raise reader.error(f"has the key {key} twice", "each key once")
        kind = reader.integer("I", f"the type of {key}")
        metadata[key] = reader.value(kind, key)
        if key == "general.alignment":
            alignment = metadata[key]
            if kind != _U32 or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
                raise reader.error(
                    f"{key} is {str(alignment)[:40]!r} of the value type {kind}",
                    "a power of two from 8 to 65536, uint32",
                )
    return metadata, alignment


def _tensor(reader: _Reader) -> GgufTensor:
    """One entry of the tensor table; its offset still counts from the start of the data."""
    name = reader.name("a tensor's name")
    dimensions = reader.integer("I", f"n_dims of {name}")
    if not 1 <= dimensions <= 4:
        raise reader.error(f"{name} has {dimensions} dimensions", "1 to 4")
    shape = tuple(reversed([reader.integer("Q", f"a dimension of {name}") for _ in range(dimensions)]))
    if 0 in shape:
        raise reader.error(f"{name} has the shape {list(shape)}", "no dimension of 0")
    format, block, block_bytes = _type(reader, name, reader.integer("I", f"the type of {name}"))
    if shape[-1] % block:
        raise reader.error(f"{name} has rows of {shape[-1]:,} in {format}", f"a multiple of its block of {block}")
    elements = 1
    for dimension in shape:
        elements *= dimension
    return GgufTensor(name, shape, format, reader.integer("Q", f"the offset of {name}"), elements // block * block_bytes)


def _type(reader: _Reader, name: str, number: int) -> tuple[str, int, int]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # here, because it is slow to import

    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise reader.error(f"{name} has the tensor type {number}", f"one of {', '.join(SUPPORTED)}") from error
    return DENSE_NAMES.get(kind.name, kind.name.lower()), block, block_bytes


def _placed(reader: _Reader, tensors: list[GgufTensor], start: int, alignment: int) -> dict[str, GgufTensor]:
    """The table by name, with offsets from the start of the file; refuses what overlaps or lies outside."""
    table: dict[str, GgufTensor] = {}
    end, last = start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        name = tensor.name
        if name in table:
            raise reader.error(f"has the tensor {name} twice", "each tensor once")
        if tensor.offset % alignment:
            raise reader.error(f"{name} starts at {tensor.offset:,} of the data", f"a multiple of {alignment}")
        offset = start + tensor.offset
        if offset + tensor.nbytes > reader.size:
            raise reader.error(f"{name} lies at bytes {offset:,} to {offset + tensor.nbytes:,}", "an end within the file")
        if offset < end:
            raise reader.error(f"{name} starts at byte {offset:,}, within {last}", f"at least byte {end:,}")
        end, last = offset + tensor.nbytes, name
        table[name] = dataclasses.replace(tensor, offset=offset)
    return table
