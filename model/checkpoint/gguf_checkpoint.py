"""A GGUF file as a checkpoint: granite, granitemoe and llama, dense or in the ten classic block formats."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from granite_kernels.errors import GraniteError

from ..config import GraniteConfig
from .base import DENSE_FORMATS, Checkpoint, Stored, TensorInfo
from .finite import SCALE_OFFSETS, count_non_finite, count_non_finite_scales, non_finite_error
from .gguf_file import GgufFile, GgufTensor, read_gguf
from .gguf_names import gguf_name, permuted_heads, unpermute
from .layout import EMBEDDING, HEAD, check_tensors, expected_tensors, warn_extra

_ROPE_FACTORS = "rope_freqs.weight"


class GgufCheckpoint(Checkpoint):
    """The checkpoint in the file `path`; see Checkpoint."""

    kind = "gguf"

    def __init__(self, path: Path, *, check_finite: bool = True) -> None:
        self.path = path
        self._check_finite = check_finite
        self._file = read_gguf(path)
        self.gguf_metadata = self._file.metadata
        stored = self._file.tensors
        _refuse_variants(self._file)
        embedding = stored.get(gguf_name(EMBEDDING))
        self.config = GraniteConfig.from_gguf(
            self.gguf_metadata,
            source=str(path),
            vocab_size=embedding.shape[0] if embedding else None,
            tie_word_embeddings=gguf_name(HEAD) not in stored,
            dtype=_dtype(embedding),
        )
        expected = expected_tensors(self.config, split=True)
        spelled = {name: gguf_name(name) for name in expected}
        found = {name: _info(name, stored[spelled[name]], path) for name in expected if spelled[name] in stored}
        check_tensors(found, expected, source=str(path), spelled=spelled, packed=SCALE_OFFSETS)
        warn_extra(stored.keys() - set(spelled.values()), str(path))
        self.tensors = {name: found[name] for name in expected}

    def read(self, name: str) -> Stored:
        info = self.tensors[name]
        blocks = self._file.blocks(self._file.tensors[info.stored_name])
        data = _shaped(blocks, info)
        if self._check_finite:
            self._search(data, info)
        heads = permuted_heads(name, self.config)
        return Stored(info.format, unpermute(data, heads) if heads else data, info.shape)

    def close(self) -> None:
        """Nothing to let go of: the mapping ends with the last tensor that uses it."""

    def _search(self, data: Tensor, info: TensorInfo) -> None:
        if info.packed:
            blocks = info.nbytes // _block_bytes(info.format)
            bad, of = (
                count_non_finite_scales(data, info.format, _block_bytes(info.format)),
                f"scales of {blocks:,} blocks",
            )
        else:
            bad, of = count_non_finite(data), f"values of {data.numel():,}"
        if bad:
            raise non_finite_error(f"{info.file}: {info.stored_name} ({info.format})", bad, of)


def _shaped(blocks: Tensor, info: TensorInfo) -> Tensor:
    if info.packed:
        return blocks.view(*info.shape[:-1], -1)
    dtype: torch.dtype = getattr(torch, info.format)
    return blocks.view(dtype).view(info.shape)


def _info(name: str, tensor: GgufTensor, path: Path) -> TensorInfo:
    return TensorInfo(name, tensor.shape, tensor.format, tensor.nbytes, path, tensor.name)


def _block_bytes(format: str) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format.upper()]]
    return int(block_bytes)


def _dtype(embedding: GgufTensor | None) -> torch.dtype:
    """That of a dense embedding; a packed one has none, and bfloat16 is what the models were trained in."""
    if embedding is None or embedding.format not in DENSE_FORMATS:
        return torch.bfloat16
    dtype: torch.dtype = getattr(torch, embedding.format)
    return dtype


def _refuse_variants(file: GgufFile) -> None:
    """What would change the result and isn't computed here."""
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise GraniteError(f"{file.path}: is one of {parts} parts; expected one file, so join them (llama-gguf-split --merge)")
    biases = [name for name in file.tensors if name.endswith(".bias")]
    if biases:
        raise GraniteError(f"{file.path}: {', '.join(biases[:5])} found; expected no biases, which aren't supported")
    factors = file.tensors.get(_ROPE_FACTORS)
    if factors is not None and not _ones(file, factors):
        raise GraniteError(f"{file.path}: {_ROPE_FACTORS} scales RoPE; expected factors of 1, no RoPE scaling is supported")


def _ones(file: GgufFile, tensor: GgufTensor) -> bool:
    if tensor.format != "float32":
        return False
    return bool((file.blocks(tensor).view(torch.float32) == 1).all())
