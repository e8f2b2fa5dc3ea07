"""GgufFormat: formats whose weights come as the blocks of a GGUF file.

A row of a file is columns / block blocks of `block_bytes` bytes each. A subclass says how blocks hold codes and
metadata (`_split`), how to write them (`_join`), and what they mean (`_values`, in the order of operations of gguf-py's
dequantizers, so that results are equal bit for bit). Everything else is common: planes (base.py) are codes and metadata
again.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.formats.base import PACK_CHUNK, Content, Format, chunks, pad_rows


class GgufFormat(Format):
    """A block format: `block` weights in `block_bytes` bytes."""

    block_bytes: int

    def pack(self, blocks: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """The planes (base.py) of a matrix whose file holds `blocks` uint8 [rows, row_bytes]. Loses nothing."""
        rows, columns = self._check(shape)
        blocks = self._rows(blocks, rows, columns)
        return self._joined(rows, columns, lambda first, last: self._pieces(pad_rows(blocks[first:last])), PACK_CHUNK)

    def blocks(self, planes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of `pack`: blocks uint8 [rows, row_bytes], equal to the file's."""
        rows, columns = self._check(shape)
        out = torch.empty(rows, columns // self.block * self.block_bytes, dtype=torch.uint8, device=planes[0].device)
        for first, last in chunks(rows, columns):
            out[first:last] = self._join(*self._codes(self._between(planes, first, last))).view(last - first, -1)
        return out

    def dequantize(self, blocks: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of blocks uint8 [..., row_bytes] as a tensor of `shape` [..., columns].

        Computed in float32, equal to gguf-py's `dequantize` bit for bit; rounded once to `dtype`.
        """
        columns = shape[-1]
        rows, columns = self._check((blocks.numel() // max(blocks.shape[-1], 1), columns))
        blocks = self._rows(blocks.reshape(rows, -1), rows, columns)
        out = torch.empty(rows, columns, dtype=dtype, device=blocks.device)
        for first, last in chunks(rows, columns):
            self._store(out[first:last], *self._split(blocks[first:last]))
        return out.view(tuple(shape))

    def _rows(self, blocks: Tensor, rows: int, columns: int) -> Tensor:
        expected = (rows, columns // self.block * self.block_bytes)
        if tuple(blocks.shape) != expected or blocks.dtype != torch.uint8:
            raise GraniteError(
                f"{self.name}: blocks uint8 {expected} are needed for {rows}x{columns} weights, found {blocks.dtype} {tuple(blocks.shape)}"
            )
        return blocks

    def _pieces(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """The planes of blocks uint8 [rows, row_bytes], rows a multiple of 16."""
        return self._planes(*self._split(blocks))

    @abc.abstractmethod
    def _split(self, blocks: Tensor) -> Content:
        """blocks uint8 [rows, row_bytes] -> codes uint8 [rows, columns] (new memory), metadata [rows, groups]."""

    @abc.abstractmethod
    def _join(self, codes: Tensor, metadata: Sequence[Tensor]) -> Tensor:
        """The inverse of `_split`: blocks uint8 [rows, blocks, block_bytes]."""

    def _fields(self, blocks: Tensor, *bounds: int) -> list[Tensor]:
        """The bytes between `bounds` of every block: contiguous uint8 [rows, blocks, n] each."""
        cut = blocks.view(blocks.shape[0], -1, self.block_bytes)
        ends = (*bounds[1:], self.block_bytes)
        fields = [cut[..., start:end] for start, end in zip(bounds, ends, strict=True)]
        return [field.clone(memory_format=torch.contiguous_format) for field in fields]  # aligned for wider types


def halves(words: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [rows, n] -> the two float16 in each word (low half first), as float32 [rows, n]."""
    pair = words.contiguous().view(torch.float16).view(*words.shape, 2).float()
    return pair[..., 0], pair[..., 1]


def as_bytes(values: Tensor) -> Tensor:
    """[rows, n] -> its bytes uint8 [rows, n, itemsize]."""
    return values.contiguous().view(torch.uint8).view(*values.shape, -1)


def as_values(fields: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous bytes uint8 [rows, blocks, n] -> values of `dtype` [rows, blocks * n / itemsize]."""
    return fields.view(dtype).flatten(1)
