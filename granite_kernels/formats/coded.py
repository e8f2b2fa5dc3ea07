"""CodedFormat: formats that other libraries store as a matrix of codes beside its scales (and zero points)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.formats.base import Format


class CodedFormat(Format):
    """A format packed from codes and metadata as they are."""

    def pack(self, codes: Tensor, *metadata: Tensor) -> tuple[Tensor, ...]:
        """The planes of codes [rows, columns] of 8 bits and of metadata [rows, groups], in the order of `metadata`."""
        rows, columns = self._check(codes.shape)
        expected = [(rows, columns // m.width if m.width else 1) for m in self.metadata]
        found = [tuple(values.shape) for values in metadata]
        if codes.element_size() != 1 or found != expected:
            raise GraniteError(
                f"{self.name}: 8-bit codes and metadata of shapes {expected} are needed for {rows}x{columns} weights, "
                f"found {codes.dtype} and {found}"
            )
        raw = codes.contiguous().view(torch.uint8)
        return self._assemble(rows, columns, lambda a, b: (raw[a:b], [values[a:b] for values in metadata]))

    def codes(self, planes: Sequence[Tensor], shape: Sequence[int]) -> tuple[Tensor, ...]:
        """The inverse of `pack`: codes [rows, columns] (`code_dtype` if they have 8 bits, else uint8), metadata."""
        rows, _ = self._check(shape)
        codes, metadata = self._codes(self._between(planes, 0, rows))
        return (codes.view(self.code_dtype) if self.code_bits == (8,) else codes, *metadata)
