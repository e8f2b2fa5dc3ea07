"""A folder with config.json and safetensors, in one file or in shards.

The safetensors library parses and maps; a tensor that is read is a view of the mapping, so that loading costs no more
anonymous memory than what the model keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from granite_kernels.errors import GraniteError

from ..config import GraniteConfig
from ..config_checks import Refusals, integer
from ..config_sources import eos_tokens
from .base import Checkpoint, Stored, TensorInfo
from .finite import count_non_finite, non_finite_error
from .folder import CONFIG, Shards, find_shards, read_json
from .layout import EMBEDDING, HEAD, check_tensors, expected_tensors, warn_extra
from .prequantized import FORMATS
from .schemes import scheme

_FORMATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # of a value, where it isn't one
# transformers 5 names the tensors of a mixture otherwise in memory than in the files that it saves
_ON_DISK = {
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
}
_TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


class SafetensorsCheckpoint(Checkpoint):
    """The checkpoint in `folder`; see Checkpoint."""

    kind = "safetensors"

    def __init__(self, folder: Path, *, check_finite: bool = True) -> None:
        self.path = folder
        self.gguf_metadata = {}
        self._check_finite = check_finite
        shards = find_shards(folder)  # first, so that a folder of something else is called what it is
        raw = read_json(folder / CONFIG)
        self.config = _with_generation_eos(GraniteConfig.from_dict(raw, source=str(folder / CONFIG)), folder)
        self.tokenizer_files = tuple(sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}))
        with contextlib.ExitStack() as stack:
            self._files = {file: stack.enter_context(_open(file)) for file in shards}
            found = _table(self._files, shards)
            self._scheme = scheme(raw, folder / CONFIG, self.config.dtype)
            if self._scheme is not None:
                found = self._scheme.normalize(found, self._tensor)
            self.tensors = self._checked(found)
            self._stack = stack.pop_all()
        if raw.get("dtype") is None and raw.get("torch_dtype") is None:
            info = self.tensors[EMBEDDING]
            dtype = torch.bfloat16 if info.packed else getattr(torch, info.format)
            self.config = dataclasses.replace(self.config, dtype=dtype)

    def _checked(self, found: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        expected = expected_tensors(self.config)
        check_tensors(found, expected, source=str(self.path), packed=() if self._scheme is None else FORMATS)
        redundant = {HEAD} if self.config.tie_word_embeddings else set()
        warn_extra(found.keys() - expected.keys() - redundant, str(self.path))
        return {name: found[name] for name in expected}

    def read(self, name: str) -> Stored:
        info = self.tensors[name]
        if self._scheme is not None and name in self._scheme:
            return self._scheme.read(info, self._tensor, check_finite=self._check_finite)
        data = self._tensor(info)
        if self._check_finite:
            bad = count_non_finite(data)
            if bad:
                raise non_finite_error(f"{info.file}: {info.stored_name}", bad, f"values of {data.numel():,}")
        return Stored(info.format, data, info.shape)

    def _tensor(self, info: TensorInfo) -> Tensor:
        try:
            data: Tensor = self._files[info.file].get_tensor(info.stored_name)
        except (SafetensorError, RuntimeError) as error:
            raise GraniteError(f"{info.file}: {info.stored_name} can't be read: {error}; download the file again") from error
        return data

    def close(self) -> None:
        self._stack.close()


def _open(file: Path) -> Any:
    size = file.stat().st_size
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        head = _header_length(file)
        raise GraniteError(f"{file}: not a valid safetensors file of {size:,} bytes{head}: {error}; download the file again") from error
    _refuse_repeated_keys(file)
    return handle


def _header_length(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
    except OSError:
        return ""
    return f" with a header said to be of {int.from_bytes(start, 'little'):,}" if len(start) == 8 else ""


def _refuse_repeated_keys(file: Path) -> None:
    # the library takes the last of two equal keys; its checks have already bounded the header
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise GraniteError(f"{file}: the header has the key {twice!r} twice; expected each once, so download the file again")
        return content

    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    json.loads(header, object_pairs_hook=unique)


def _table(files: dict[Path, Any], shards: Shards) -> dict[str, TensorInfo]:
    table: dict[str, TensorInfo] = {}
    for file, handle in files.items():
        listed, present = shards[file], set(handle.keys())
        if listed is not None and listed != present:
            _refuse_index(file, listed, present)
        for stored_name in sorted(present):
            if not stored_name.isprintable():  # it is going to be a part of messages
                raise GraniteError(f"{file}: holds a tensor named {stored_name[:200]!r}; expected printable characters")
            part = handle.get_slice(stored_name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            name = _canonical(stored_name)
            format = _FORMATS.get(dtype, dtype.lower())
            nbytes = torch.Size(shape).numel() * _BYTES.get(dtype, 1)
            if name in table:
                other = table[name]
                raise GraniteError(f"{file}: {stored_name} is also {other.stored_name} in {other.file.name}; expected one of them")
            table[name] = TensorInfo(name, shape, format, nbytes, file, stored_name)
    return table


def _refuse_index(file: Path, listed: frozenset[str], present: set[str]) -> None:
    absent, unlisted = sorted(listed - present), sorted(present - listed)
    problems = [f"lacks {', '.join(absent)}"] if absent else []
    problems += [f"holds {', '.join(unlisted)}, which the index doesn't list"] if unlisted else []
    raise GraniteError(f"{file}: {' and '.join(problems)}; expected what the index says, so download both again")


def _canonical(name: str) -> str:
    for in_memory, on_disk in _ON_DISK.items():
        if name.endswith(in_memory):
            return name.removesuffix(in_memory) + on_disk
    return name


def _with_generation_eos(config: GraniteConfig, folder: Path) -> GraniteConfig:
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    more = eos_tokens(read_json(path).get("eos_token_id"))
    for token in more:
        integer(token, 0, config.vocab_size - 1, "eos_token_id", Refusals(str(path)))
    return dataclasses.replace(config, eos_token_id=tuple(dict.fromkeys(config.eos_token_id + more)))
