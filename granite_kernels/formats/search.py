"""Scales that lose least: the searches behind the quantizers, for many groups at once.

Each takes groups x float32 [..., n]. The k-quants' two follow llama.cpp's method, so that the same weights get about
the same codes: try several scales around the one that the largest weight asks for, round, solve for the best scale of
those codes by weighted least squares, keep the best.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-15  # groups whose weights are all below it are stored as zeros


def extreme(x: Tensor) -> Tensor:
    """The value of largest magnitude in each group, with its sign: [..., 1]."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where that would overflow."""
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0.0, 1.0 / x)


def symmetric(x: Tensor, levels: int, candidates: list[float], weights: Tensor | None = None) -> Tensor:
    """Scales [..., 1] that minimise sum(weights * (x - scale * q)^2), q = round(x / scale) in -levels .. levels - 1.

    Candidate c tries the scale extreme / c; the first one wins ties.
    """
    top = extreme(x)
    unit = torch.where(top.abs() < TINY, 0.0, inverse(top))
    return _best(x, unit, candidates, levels, torch.zeros_like(top), weights)


def polished(x: Tensor, scale: Tensor, levels: int, factors: list[float]) -> Tensor:
    """The scales among `scale` times each of `factors`, solved again for the codes that they give, of least squared error."""
    return _best(x, inverse(scale), factors, levels, scale, None)


def _best(x: Tensor, unit: Tensor, factors: list[float], levels: int, scale: Tensor, weights: Tensor | None) -> Tensor:
    """The best of the scales that solve for the codes of `factor * unit` codes a weight; `scale` where none gains anything."""
    best_gain, best_scale = torch.zeros_like(unit), scale
    for factor in factors:
        q = (x * (factor * unit)).round_().clamp_(-levels, levels - 1)
        weighted = q if weights is None else q * weights
        along = (weighted * x).sum(-1, keepdim=True)
        square = (weighted * q).sum(-1, keepdim=True)
        solved = along * inverse(square)
        gain = solved * along  # the drop of the squared error below that of storing zeros
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, solved, best_scale)
    return best_scale


def affine(x: Tensor, top: int, steps: list[float], weights: Tensor) -> tuple[Tensor, Tensor]:
    """scale and low >= 0 [..., 1] that minimise sum(weights * (x - (scale * q - low))^2), q in 0 .. top.

    Starts from the range of the group (which always includes 0) cut in `top` parts, then tries top + step parts of the
    range from the best offset so far to the largest weight.
    """
    base = x.amin(-1, keepdim=True).clamp_(max=0.0)
    x = x - base  # from here on offsets count from the lowest weight, so that the sums below hardly cancel
    most, ceiling = x.amax(-1, keepdim=True), -base
    weighted_x = weights * x
    sum_w, sum_x = weights.sum(-1, keepdim=True), weighted_x.sum(-1, keepdim=True)

    def sums(parts: float, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = ((x - offset) * (parts * inverse(most - offset))).round_().clamp_(0, top)
        weighted = q * weights
        return weighted.sum(-1, keepdim=True), weighted.mul_(q).sum(-1, keepdim=True), q.mul_(weighted_x).sum(-1, keepdim=True)

    def loss(scale: Tensor, offset: Tensor, sum_q: Tensor, sum_qq: Tensor, sum_qx: Tensor) -> Tensor:
        """Up to sum(weights * x^2), which all have."""
        return scale * (scale * sum_qq - 2 * sum_qx) + offset * (offset * sum_w + 2 * (scale * sum_q - sum_x))

    scale, offset = most / top, torch.zeros_like(most)
    flat = scale == 0
    best = loss(scale, offset, *sums(top, offset))
    for step in steps:
        sum_q, sum_qq, sum_qx = found = sums(top + step, offset)
        determinant = sum_w * sum_qq - sum_q * sum_q
        over = inverse(determinant)
        new_scale = (sum_w * sum_qx - sum_x * sum_q) * over
        new_offset = (sum_qq * sum_x - sum_q * sum_qx) * over
        above = new_offset > ceiling  # a min is stored as a positive number to subtract
        new_scale = torch.where(above, (sum_qx - ceiling * sum_q) * inverse(sum_qq), new_scale)
        new_offset = torch.where(above, ceiling, new_offset)
        new = loss(new_scale, new_offset, *found)
        better = (determinant > 0) & (new < best)
        best = torch.where(better, new, best)
        scale = torch.where(better, new_scale, scale)
        offset = torch.where(better, new_offset, offset)
    return torch.where(flat, 0.0, scale), (ceiling - offset).clamp_(min=0.0)
