"""Checkpoints: a folder of safetensors, a GGUF file or a hub id becomes named tensors, mapped and read one at a time.

Every check of bad input lives here, and nothing is ever unpickled.
"""

from __future__ import annotations

import os
from pathlib import Path

from granite_kernels.errors import GraniteError

from .base import Checkpoint, Stored, TensorInfo
from .folder import PICKLES
from .gguf_checkpoint import GgufCheckpoint
from .gguf_file import MAGIC
from .hub import locate
from .safetensors_file import SafetensorsCheckpoint

__all__ = ["Checkpoint", "Stored", "TensorInfo", "open_checkpoint"]


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    check_finite: bool = True,
) -> Checkpoint:
    """Open a .gguf file, a folder with config.json and safetensors, or a hub id; no weights are read yet.

    Raises GraniteError, naming the file and the tensor or field, for anything that can't be loaded whole.
    """
    path = locate(source, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    try:
        return _open(path, check_finite)
    except OSError as error:
        raise GraniteError(f"{error.filename or path}: can't be read: {error.strerror}; check its permissions") from error


def _open(path: Path, check_finite: bool) -> Checkpoint:
    if path.is_dir():
        return SafetensorsCheckpoint(path, check_finite=check_finite)
    if path.suffix == ".gguf" or _magic(path) == MAGIC:
        return GgufCheckpoint(path, check_finite=check_finite)
    if path.suffix in PICKLES:
        raise GraniteError(f"{path}: pickled files can run code and are never opened; convert the checkpoint to safetensors")
    if path.suffix == ".safetensors":
        raise GraniteError(f"{path}: is one file of a checkpoint; give its folder, {path.parent}, with config.json")
    raise GraniteError(f"{path}: not a checkpoint; expected a .gguf file, or a folder with config.json and *.safetensors")


def _magic(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(len(MAGIC))
