"""Weight: the matrix that every matrix operation takes, in any format.

A weight [rows, columns] is a stack of parts along the rows, each with a format and its planes. One part is the usual case; q|k|v
of a Q4_K_M file has two formats, and the matrices of somebody else's model stay three separate tensors. Output row order is
the order of the parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

DENSE = "dense"  # one plane [rows, columns] in the model's dtype


class Part(nn.Module):
    """Rows of a weight that share a format: `planes` as the format packs them (formats/<format>.py)."""

    def __init__(self, format: str, planes: tuple[Tensor, ...], shape: tuple[int, int]) -> None:
        super().__init__()
        if format == DENSE and (len(planes) != 1 or tuple(planes[0].shape) != tuple(shape)):
            raise ValueError(f"a dense part has one plane of shape {shape}, got {[tuple(p.shape) for p in planes]}")
        self.format = format
        self.shape = shape
        self._count = len(planes)
        for index, plane in enumerate(planes):
            if format == DENSE:
                self.register_parameter(f"plane{index}", nn.Parameter(plane, requires_grad=False))
            else:
                self.register_buffer(f"plane{index}", plane)
        self.planes = self._gather()

    def _gather(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"plane{index}") for index in range(self._count))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Part:
        def move(plane: Tensor) -> Tensor:
            moved = fn(plane)
            return moved if moved.dtype == plane.dtype else plane.to(moved.device)  # a dtype never reaches into packed planes

        super()._apply(fn if self.format == DENSE else move, recurse)
        self.planes = self._gather()
        return self

    def make_row_major(self) -> None:
        """Lay a dense plane out as the kernels assume it; a plane that is so already stays where it is."""
        for plane in self.parameters():
            plane.data = plane.data.contiguous()

    @property
    def nbytes(self) -> int:
        return sum(plane.numel() * plane.element_size() for plane in self.planes)


class Weight(nn.Module):
    """A matrix [rows, columns] made of parts stacked along the rows."""

    def __init__(self, *parts: Part) -> None:
        super().__init__()
        if not parts or len({part.shape[1] for part in parts}) != 1:
            raise ValueError(f"parts of one width are needed, got {[part.shape for part in parts]}")
        for index, part in enumerate(parts):
            self.add_module(str(index), part)
        self.parts = parts
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    @classmethod
    def dense(cls, *matrices: Tensor) -> Weight:
        """From 16- or 32-bit matrices [rows_i, columns]; each stays its own tensor (no copy)."""
        return cls(*(Part(DENSE, (matrix,), (matrix.shape[0], matrix.shape[1])) for matrix in matrices))

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(part.format for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {'|'.join(self.formats)}, {self.nbytes:,} bytes"


def dense_matrix(part: Part, dtype: torch.dtype) -> Tensor:
    """The part's values [rows, columns] in `dtype`; the stored tensor itself where it is dense and of that dtype already."""
    if part.format == DENSE:
        plane = part.planes[0]
        return plane if plane.dtype == dtype else plane.to(dtype)
    from granite_kernels.formats import get

    return get(part.format).unpack(part.planes, part.shape, dtype)


def dense_rows(part: Part, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Rows first .. first + count - 1 of `dense_matrix`; of a packed part no others are decoded."""
    if part.format == DENSE:
        return dense_matrix(part, dtype)[first : first + count]
    from granite_kernels.formats import get
    from granite_kernels.formats.base import ROWS

    begin, end = first // ROWS, -(-(first + count) // ROWS)  # every plane is linear in groups of ROWS rows
    groups = part.planes[0].shape[0] // ROWS
    planes = [plane.unflatten(0, (groups, -1))[begin:end].flatten(0, 1) for plane in part.planes]
    rows = get(part.format).unpack(planes, (first + count - begin * ROWS, part.shape[1]), dtype)
    return rows[first - begin * ROWS :]
