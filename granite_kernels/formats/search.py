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
    best_gain = best_scale = torch.zeros_like(top)
    for candidate in candidates:
        q = (x * (candidate * unit)).round_().clamp_(-levels, levels - 1)
        weighted = q if weights is None else q * weights
        along = (weighted * x).sum(-1, keepdim=True)
        square = (weighted * q).sum(-1, keepdim=True)
        scale = along * inverse(square)
        gain = scale * along  # the drop of the squared error below that of storing zeros
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def affine(x: Tensor, top: int, steps: list[float], weights: Tensor) -> tuple[Tensor, Tensor]:
    """scale and low >= 0 [..., 1] that minimise sum(weights * (x - (scale * q - low))^2), q in 0 .. top.

    Starts from the range of the group (which always includes 0) cut in `top` parts, then tries top + step parts of the
    range from the best offset so far to the largest weight.
    """
    most, offset = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).clamp_(max=0.0)
    sum_w = weights.sum(-1, keepdim=True)
    sum_x = (weights * x).sum(-1, keepdim=True)
    scale = (most - offset) / top
    flat = scale == 0
    q = ((x - offset) * inverse(scale)).round_().clamp_(0, top)
    best = _loss(x, q, scale, offset, weights)
    for step in steps:
        q = ((x - offset) * ((top + step) * inverse(most - offset))).round_().clamp_(0, top)
        weighted = q * weights
        sum_q = weighted.sum(-1, keepdim=True)
        sum_qq = (weighted * q).sum(-1, keepdim=True)
        sum_qx = (weighted * x).sum(-1, keepdim=True)
        determinant = sum_w * sum_qq - sum_q * sum_q
        solvable = determinant > 0
        over = inverse(determinant)
        new_scale = (sum_w * sum_qx - sum_x * sum_q) * over
        new_offset = (sum_qq * sum_x - sum_q * sum_qx) * over
        above = new_offset > 0  # a min is stored as a positive number to subtract
        new_scale = torch.where(above, sum_qx * inverse(sum_qq), new_scale)
        new_offset = new_offset.clamp(max=0.0)
        loss = _loss(x, q, new_scale, new_offset, weights)
        better = solvable & (loss < best)
        best = torch.where(better, loss, best)
        scale = torch.where(better, new_scale, scale)
        offset = torch.where(better, new_offset, offset)
    return torch.where(flat, 0.0, scale), -offset


def _loss(x: Tensor, q: Tensor, scale: Tensor, offset: Tensor, weights: Tensor) -> Tensor:
    error = (q * scale).add_(offset).sub_(x)
    return error.square_().mul_(weights).sum(-1, keepdim=True)
