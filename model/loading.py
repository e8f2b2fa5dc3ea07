"""What `from_pretrained` does: resolve the arguments, open the source, build the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from granite_kernels.errors import GraniteError
from granite_kernels.ops import BACKENDS

from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.random import RandomCheckpoint
from .config import GraniteConfig
from .granite import Weights
from .progress import loading_bar
from .quantization import alternatives, held, plan, stored_bytes
from .room import check_weights, name_of
from .tokenizer import Tokenizer, load_tokenizer
from .weights import Loader, load_weights, prefers_column_major

Row = TypeVar("Row")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SYNONYMS = {"torch_dtype": "dtype", "device_map": "device"}
OPTIONS = ("quantization", "dtype", "device", "backend", "max_context", "revision", "cache_dir", "token", "local_files_only")


class Table(tuple[Row, ...], Generic[Row]):
    """Rows (dataclasses) that print as a table."""

    def __str__(self) -> str:
        if not self:
            return "(nothing)"
        names = [field.name for field in dataclasses.fields(self[0])]  # type: ignore[arg-type]  # rows are dataclasses
        cells = [names, *([str(getattr(row, name)) for name in names] for row in self)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
        return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


@dataclasses.dataclass(frozen=True)
class Loaded:
    config: GraniteConfig
    weights: Weights
    tokenizer: Tokenizer | None
    backend: str
    max_context: int | None


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """None and "auto": the first GPU, else the CPU."""
    if device is None or device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise GraniteError(f'device is {device!r}, expected "cuda", "cuda:1", "cpu" or "auto"') from error
    if resolved.type not in ("cpu", "cuda"):
        raise GraniteError(f"device is {device!r}, expected an NVIDIA GPU or the CPU")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        built = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no NVIDIA GPU"
        raise GraniteError(f'device is {device!r}, but {built}; use device="cpu", or see `granite-kernels doctor`')
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise GraniteError(f"device is {device!r}, but there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", resolved.index or 0) if resolved.type == "cuda" else resolved


def resolve_dtype(dtype: torch.dtype | str | None, stored: torch.dtype) -> torch.dtype:
    """ "auto" and None: as stored."""
    if dtype is None or dtype == "auto":
        return stored
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise GraniteError(f'dtype is {dtype!r}, expected "auto", {", ".join(DTYPES)}')
    return resolved


def arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The options under our names, each known and given once."""
    named: dict[str, Any] = {}
    for name, value in options.items():
        ours = SYNONYMS.get(name, name)
        if ours not in OPTIONS:
            raise GraniteError(f"from_pretrained doesn't take {name!r}; it takes {', '.join((*OPTIONS, *SYNONYMS))}")
        if ours in named:
            raise GraniteError(f"both {ours!r} and its other spelling are given")
        named[ours] = value
    if isinstance(named.get("device"), dict):
        raise GraniteError("device_map is a map: the model lives on one device; give its name")
    backend = named.get("backend", "auto")
    if backend not in BACKENDS:
        raise GraniteError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    return named


def load(source: str | Path, **options: Any) -> Loaded:
    """Open `source` and build its weights on the device."""
    given = arguments(options)
    device = resolve_device(given.get("device"))
    where = {name: given[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in given}
    with open_checkpoint(source, **where) as checkpoint:
        config = checkpoint.config
        natural = (torch.float32 if device.type == "cpu" else torch.bfloat16) if checkpoint.packed else config.dtype
        dtype = resolve_dtype(given.get("dtype"), natural)
        backend = given.get("backend", "auto")
        chosen = plan(checkpoint.tensors, config.num_hidden_layers, given.get("quantization"), checkpoint.path)
        formats = held(checkpoint.tensors, chosen, dtype=dtype, device=device, backend=backend)
        _check_room(checkpoint, formats, given.get("quantization"), dtype, device)
        tokenizer = load_tokenizer(checkpoint)
        with loading_bar(len(checkpoint.tensors)) as progress:
            column_major = prefers_column_major(device, dtype, backend)
            weights = load_weights(Loader(checkpoint, dtype, device, column_major, progress, formats), config)
    return Loaded(config, weights, tokenizer, backend, given.get("max_context"))


def _check_room(
    checkpoint: Checkpoint, formats: Mapping[str, str], quantization: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise GraniteError, which names what would fit, where the weights don't."""
    need = stored_bytes(checkpoint.tensors, formats, dtype)
    others = alternatives(checkpoint.tensors, checkpoint.config.num_hidden_layers, dtype)
    check_weights(need, quantization or name_of(dtype), device, others)


def random_weights(
    config: GraniteConfig, seed: int, quantization: str | None, dtype: torch.dtype | str, device: torch.device | str | None, backend: str
) -> Weights:
    """The weights of `from_config`: random ones, made and quantized on the device."""
    where, kind = resolve_device(device), resolve_dtype(dtype, config.dtype)
    checkpoint = RandomCheckpoint(config, seed=seed, dtype=kind, device=where)
    formats = plan(checkpoint.tensors, config.num_hidden_layers, quantization, "random weights")
    _check_room(checkpoint, formats, quantization, kind, where)
    return load_weights(Loader(checkpoint, kind, where, prefers_column_major(where, kind, backend), formats=formats), config)
