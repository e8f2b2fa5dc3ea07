"""How the matrix body is launched for a weight: its pieces, its blocks, the scratch it needs, and what all its kernels are given."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from granite_kernels import formats as known
from granite_kernels.launch import EIGHT_BITS, MatrixLaunch, Target, matrix_launch, matrix_unroll, target
from granite_kernels.linear.shape import Piece, Shape
from granite_kernels.linear.tiles import as_words, constants
from granite_kernels.weight import DENSE

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
REGISTERS = 255  # that a thread may have; told nothing, ptxas keeps to 128 at the price of a few spills, for programs that are not there
NEIGHBOURS = 8  # `half` of a matrix whose rows have no partners: sixteen neighbours a group
GATE_UP = 0  # stands for half of all rows


def _kwidth(format: str) -> int:
    """Consecutive k that a thread holds in the dot operand which Triton chooses; another value is right, but moves registers."""
    return 2 if format == DENSE or TRITON >= (3, 8) else 4


@functools.cache  # asked for on every launch
def _planes_and_constants(name: str) -> tuple[int, tuple[int, ...]]:
    """How many planes a format has, and the constants of its Piece."""
    if name == DENSE:
        return 1, (0, 0, 0, 0)
    found = known.get(name)
    return len(found.layout((16, found.block))), tuple(constants(name).values())


def pieces_of(planes: list[Tensor], names: list[str], columns: int, shares: int) -> tuple[list[Tensor], list[Piece]]:
    """The planes as kernels take them, and the pieces: one of all dense parts if there are no others, else one a part."""
    if set(names) == {DENSE}:
        return planes, [Piece(DENSE, 0, len(planes), matrix_unroll(columns, shares, DENSE), _kwidth(DENSE), 0, 0, 0, 0)]
    flat: list[Tensor] = []
    pieces = []
    for name in names:
        first = len(flat)
        count, more = _planes_and_constants(name)
        own = planes[first : first + count]
        flat += as_words(own) if name in EIGHT_BITS else own
        pieces.append(Piece(name, first, len(own), matrix_unroll(columns, shares, name), _kwidth(name), *more))
    return flat, pieces


def blocks_of(ends: Sequence[int], half: int, formats: Sequence[str], shape: MatrixLaunch) -> int:
    """Row blocks of a launch: each piece has its own."""
    if half == GATE_UP:
        return shape.blocks(ends[-1], ends[-1] // 2)
    if set(formats) == {DENSE}:
        return shape.blocks(ends[-1], half)
    return sum(shape.blocks(end - start, half) for start, end in zip((0, *ends), ends, strict=False))


def weight_launch(ends: Sequence[int], columns: int, half: int, formats: Sequence[str], tokens: int, where: Target) -> MatrixLaunch:
    """The launch for a weight whose parts end at rows `ends`. The format of the most rows decides."""
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    shape = matrix_launch(ends[-1], columns, tokens, where, max(zip(sizes, formats, strict=True))[1])
    if is_across(half, formats) and shape.groups == 1:
        return dataclasses.replace(shape, groups=2)
    return shape


def is_across(half: int, formats: Sequence[str]) -> bool:
    """Whether gate and up are pieces of their own."""
    return half == GATE_UP and len(formats) > 1 and set(formats) != {DENSE}


def arguments(
    x: Tensor, planes: list[Tensor], formats: str, ends: list[int], half: int, tickets: Tensor, partials: Tensor
) -> tuple[int, dict[str, Any]]:
    """The number of programs, and the arguments that all kernels share."""
    columns, tokens = x.shape[-1], x.shape[:-1].numel()
    names = formats.split("|")
    where = target(x)
    chosen = weight_launch(ends, columns, half, names, tokens, where)
    across = is_across(half, names)
    given, pieces = pieces_of(planes, names, columns, chosen.warps * chosen.splits)
    pdl = x.is_cuda and where.arch >= 90
    shape = Shape(columns, tuple(pieces), chosen.groups, chosen.tokens, tokens == 1, chosen.warps, chosen.splits, across, pdl)
    common = dict(
        x_ptr=x,
        planes=tuple(given),
        tickets_ptr=tickets,
        partials_ptr=partials,
        ends=tuple(ends),
        tokens=tokens,
        rows=ends[-1],
        # float16 could overflow before the root is known, and float32 should see what the model sees
        NORM=1 if x.dtype == torch.bfloat16 else 2,
        SHAPE=shape,
        num_warps=chosen.warps,
        enable_fp_fusion=True,
        maxnreg=REGISTERS,
        **({"launch_pdl": True} if pdl else {}),
    )
    return blocks_of(ends, half, names, chosen) * chosen.splits, common


def workspace_size(ends: Sequence[int], columns: int, half: int, formats: Sequence[str], tokens: int, where: Target) -> tuple[int, int]:
    """(tickets, partial sums) of a product of so many tokens with a weight whose parts end at rows `ends`.

    half: NEIGHBOURS, GATE_UP, or half of head_dim for q|k|v.
    """
    shape = weight_launch(ends, columns, half, formats, tokens, where)
    return shape.workspace(blocks_of(ends, half, formats, shape))
