"""Format: a kind of weight as the kernels read it.

A format cuts a matrix [rows, columns] into integer codes, one a weight, and metadata (scales, zero points) shared by
groups of consecutive columns. Its planes, in this order, with P = rows padded to a multiple of 16 (padding rows are
zero bits) and U = columns / 32:

    codes, lowest bits first    8 bits    [P, columns]       natural order
                                4 bits    int32 [P, U, 4]    fields as in words.py
                                2 bits    int32 [P, U, 2]
                                1 bit     int32 [P/8, U, 8]  (of row 8g + r at [g, u, r])
    metadata, each              [P/8, groups, 8]             (of row 8g + r, group j at [g, j, r])

Eight rows interleaved: a program of eight rows finds the eight values of a group in one vector load, and needs no
movement between threads to meet the codes. A row's only scale is a group as wide as the row: [P/8, 1, 8]. Every plane
is an allocation of its own.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.formats.words import UNIT, gather, spread

ROWS = 16  # rows of a plane are padded to a multiple of it
CHUNK = 1 << 20  # weights converted at a time: temporaries stay small against any matrix
PACK_CHUNK = 1 << 21  # of a file's blocks: half the bytes and twice the operations, each of which has a price of its own
SEARCH_CHUNK = 1 << 18  # weights quantized at a time on the CPU: float32 temporaries stay in the cache (twice as fast)
DEVICE_CHUNK = 1 << 24  # weights quantized at a time on a GPU: enough to fill it
ROW = 0  # width of a group: the whole row

Content = tuple[Tensor, Sequence[Tensor]]  # of some rows: codes uint8 [rows, columns]; metadata [rows, groups] each


@dataclasses.dataclass(frozen=True)
class Metadata:
    """One metadata plane: `width` columns share a value (ROW: all of them) of `dtype`."""

    width: int
    dtype: torch.dtype


class Format(abc.ABC):
    """One kind of weight. `block`: columns are a multiple of it; `code_bits`: the fields of a code, lowest first."""

    name: str
    block: int
    code_bits: tuple[int, ...]
    code_dtype: torch.dtype = torch.int8  # of a plane of 8-bit codes
    metadata: tuple[Metadata, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits of all planes a weight, without padding rows and without values that a whole row shares."""
        return sum(self.code_bits) + sum(8 * m.dtype.itemsize / m.width for m in self.metadata if m.width != ROW)

    def layout(self, shape: Sequence[int]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each plane of a matrix of `shape` (float16 scales may be bfloat16 where a file's are)."""
        rows, columns = self._check(shape)
        padded = -(-rows // ROWS) * ROWS
        by_bits = {
            8: ((padded, columns), self.code_dtype),
            4: ((padded, columns // UNIT, 4), torch.int32),
            2: ((padded, columns // UNIT, 2), torch.int32),
            1: ((padded // 8, columns // UNIT, 8), torch.int32),
        }
        groups = [(columns // m.width if m.width else 1, m.dtype) for m in self.metadata]
        return (*(by_bits[bits] for bits in self.code_bits), *(((padded // 8, n, 8), dtype) for n, dtype in groups))

    def unpack(self, planes: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [rows, columns], computed in float32 as the format's reference does, rounded once to `dtype`."""
        rows, columns = self._check(shape)
        out = torch.empty(rows, columns, dtype=dtype, device=planes[0].device)
        for first, last in chunks(rows, columns):
            self._store(out[first:last], *self._codes(self._between(planes, first, last)))
        return out

    def rows(self, planes: Sequence[Tensor], shape: Sequence[int], ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows `ids` (integers, any shape) as [*ids.shape, columns]: unpack(...)[ids], but only those rows are read."""
        _, columns = self._check(shape)
        flat = ids.reshape(-1).long()
        out = torch.empty(flat.shape[0], columns, dtype=dtype, device=planes[0].device)
        self._store(out, *self._codes(self._picked(planes, flat)))
        return out.view(*ids.shape, columns)

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The planes of a floating-point matrix weight [rows, columns], on its device; each format says how."""
        rows, columns = self._check(weight.shape)
        size = DEVICE_CHUNK if weight.is_cuda else SEARCH_CHUNK
        return self._assemble(rows, columns, lambda first, last: self._encode(weight[first:last].float()), size)

    def _encode(self, weight: Tensor) -> Content:
        """weight float32 [rows, columns] -> codes uint8 [rows, columns], metadata [rows, groups] each."""
        raise GraniteError(f"{self.name}: matrices are read in this format but can't be quantized to it")

    def _assemble(self, rows: int, columns: int, content: Callable[[int, int], Content], size: int = CHUNK) -> tuple[Tensor, ...]:
        """Planes of a matrix from the codes and metadata of rows first .. last - 1, about `size` weights at a time."""

        def pieces(first: int, last: int) -> tuple[Tensor, ...]:
            codes, metadata = content(first, last)
            return self._planes(pad_rows(codes), [pad_rows(values) for values in metadata])

        return self._joined(rows, columns, pieces, size)

    def _joined(self, rows: int, columns: int, made: Callable[[int, int], tuple[Tensor, ...]], size: int = CHUNK) -> tuple[Tensor, ...]:
        """Planes of a matrix from those `made` of rows first .. last - 1, padded."""
        planes: tuple[Tensor, ...] = ()
        layout = self.layout((rows, columns))
        for first, last in chunks(rows, columns, size):
            pieces = made(first, last)
            if not planes:  # 16-bit scales may be of either kind: the pieces know
                planes = tuple(p.new_empty(shape) for p, (shape, _) in zip(pieces, layout, strict=True))
            for plane, piece in zip(planes, pieces, strict=True):
                start = first * plane.shape[0] // planes[0].shape[0]
                plane[start : start + piece.shape[0]] = piece
        return planes

    @abc.abstractmethod
    def _values(self, codes: Tensor, metadata: Sequence[Tensor], out: Tensor) -> None:
        """Write to out float32 [rows, columns] the values of codes uint8 [rows, columns] (which may be overwritten)."""

    def _check(self, shape: Sequence[int]) -> tuple[int, int]:
        if len(shape) != 2 or shape[1] % self.block or min(shape) < 1:
            raise GraniteError(f"{self.name}: a matrix whose columns are a multiple of {self.block} is needed, found {tuple(shape)}")
        return shape[0], shape[1]

    def _store(self, out: Tensor, codes: Tensor, metadata: Sequence[Tensor]) -> None:
        if out.dtype == torch.float32:
            self._values(codes, metadata, out)
        else:
            values = torch.empty(out.shape, dtype=torch.float32, device=out.device)
            self._values(codes, metadata, values)
            out.copy_(values)

    def _planes(self, codes: Tensor, metadata: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Planes of codes uint8 [rows, columns] and metadata [rows, groups]; rows a multiple of 16."""
        planes, shift = [], 0
        for bits in self.code_bits:
            if bits == 8:
                planes.append(codes.view(self.code_dtype))
            else:
                words = gather(codes, shift, bits)
                planes.append(interleave(words[..., 0]) if bits == 1 else words)
            shift += bits
        return (*planes, *(interleave(values) for values in metadata))

    def _codes(self, pieces: Sequence[Tensor]) -> Content:
        """The inverse of `_planes`, of pieces as `_between` and `_picked` cut them from planes."""
        codes, shift = None, 0
        for bits, piece in zip(self.code_bits, pieces, strict=False):
            if bits == 8:
                part = piece.view(torch.uint8).clone()  # the planes' own bytes: callers may write to codes
            else:
                part = spread(piece[..., None] if bits == 1 else piece, bits)
            codes = part if codes is None else codes.bitwise_or_(part.bitwise_left_shift_(shift))
            shift += bits
        assert codes is not None
        return codes, pieces[len(self.code_bits) :]

    def _between(self, planes: Sequence[Tensor], first: int, last: int) -> list[Tensor]:
        """Rows first .. last - 1 of each plane, [rows, ...]; first a multiple of 8."""
        groups = slice(first // 8, -(-last // 8))
        return [
            separate(plane[groups])[: last - first] if mixed else plane[first:last]
            for plane, mixed in zip(planes, self._interleaved, strict=True)
        ]

    def _picked(self, planes: Sequence[Tensor], ids: Tensor) -> list[Tensor]:
        """Rows `ids` of each plane, as `_between`."""
        return [plane[ids // 8, :, ids % 8] if mixed else plane[ids] for plane, mixed in zip(planes, self._interleaved, strict=True)]

    @property
    def _interleaved(self) -> list[bool]:
        return [bits == 1 for bits in self.code_bits] + [True] * len(self.metadata)


def chunks(rows: int, columns: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `size` weights (or 16 rows), cut at multiples of 16."""
    step = max(size // columns // ROWS, 1) * ROWS
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def pad_rows(values: Tensor) -> Tensor:
    """[rows, n] with zero rows added up to a multiple of 16."""
    missing = -values.shape[0] % ROWS
    return F.pad(values, (0, 0, 0, missing)) if missing else values


def interleave(values: Tensor) -> Tensor:
    """[rows, n] -> [rows / 8, n, 8], a view"""
    return values.view(-1, 8, values.shape[1]).transpose(1, 2)


def separate(values: Tensor) -> Tensor:
    """[rows / 8, n, 8] -> [rows, n]"""
    return values.transpose(1, 2).clone(memory_format=torch.contiguous_format).view(-1, values.shape[1])
