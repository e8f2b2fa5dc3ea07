"""What every kind of checkpoint offers: a configuration, a table of tensors, and `read`, one tensor at a time.

Tensors have the names in the files that transformers saves, whatever the source calls them. In a GGUF file the gate
and up halves of experts may differ in type, so that they stay apart: `block_sparse_moe.{gate_exps,up_exps}.weight`
stand for `input_linear.weight`, and `shared_mlp.{gate_proj,up_proj}.weight` for that of the shared expert.
"""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ..config import GraniteConfig

DENSE_FORMATS = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor as it lies in a file: `shape` counts values, `format` is a dtype's name or a block format's ("q4_k")."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    file: Path
    stored_name: str

    @property
    def packed(self) -> bool:
        return self.format not in DENSE_FORMATS


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor's content: `data` has that dtype and shape, or is the raw blocks, uint8 [..., rows, row_bytes].

    Where a format keeps codes beside their scales (int8, int4, fp8), `data` are the codes of 8 bits [rows, columns] and `metadata`
    the rest, as the format's `pack` takes them. All is mapped from the file wherever nothing had to move: read it, don't write to it.
    """

    format: str
    data: Tensor
    shape: tuple[int, ...]
    metadata: tuple[Tensor, ...] = ()


class Checkpoint(abc.ABC):
    """An open checkpoint; a context manager.

    Attributes: `kind` ("safetensors" or "gguf"), `path` (the folder or file), `config`, `tensors` (all that the model
    uses, by canonical name), `tokenizer_files` (those in the folder), `gguf_metadata` (a GGUF's pairs), `concurrent` (whether several
    threads may read at a time, in any order).
    """

    kind: str
    path: Path
    config: GraniteConfig
    tensors: dict[str, TensorInfo]
    tokenizer_files: tuple[Path, ...] = ()
    gguf_metadata: dict[str, Any]
    concurrent: bool = True

    @abc.abstractmethod
    def read(self, name: str) -> Stored:
        """The tensor `name`. Raises GraniteError for NaN or infinite values, unless opened with check_finite=False."""

    @property
    def packed(self) -> bool:
        """Whether any tensor holds quantized blocks."""
        return any(info.packed for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(info.nbytes for info in self.tensors.values())

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the files. Tensors already read stay valid: they keep their own mapping."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
