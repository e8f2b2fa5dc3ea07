"""Shape: all that a matrix kernel is compiled for, in one constexpr."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """Parts of a weight that one body serves: a packed part, or all dense ones."""

    format: str
    plane: int  # index of its first plane among those of the launch
    planes: int  # how many it has; of dense parts each has one
    unroll: int  # steps that the loop takes at a time
    kwidth: int  # consecutive k that a thread holds in the dot operand which Triton chooses
    low: int  # this and the rest: see constants() in tiles.py; 0 where dense
    high: int
    group: int
    center: int


class Shape(NamedTuple):
    """Sizes and the launch that launch.py chose for them."""

    columns: int
    pieces: tuple[Piece, ...]
    groups: int
    tokens: int  # 8 or 16: columns of the tensor-core product
    one: bool  # there is a single token
    warps: int
    splits: int
    across: bool  # the first rows of the pairs are piece 0, the second ones piece 1
    pdl: bool
