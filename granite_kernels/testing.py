"""The accuracy rule that tests and benchmarks share.

An operation is right when its error against the same operation in float64 is at most twice the error of plain PyTorch in the
same dtype, plus one unit in the last place of the largest value: we may not be worse than what people run today, and the rule
needs no tolerance chosen by hand.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Errors (largest absolute difference from the float64 result) of an implementation and of plain PyTorch."""

    error: float
    eager: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # false for NaN

    def __str__(self) -> str:
        return f"error {self.error:.3e}, PyTorch's {self.eager:.3e}, limit {self.limit:.3e}"


def ulp(value: float, dtype: torch.dtype) -> float:
    """The spacing of `dtype` at `value`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(torch.tensor(max(abs(value), info.tiny), dtype=torch.float64)).exponent.item() - 1
    return info.eps * 2.0**exponent


def accuracy(actual: Tensor, exact: Tensor, eager: Tensor) -> Accuracy:
    """Hold `actual` against `exact` (float64) by the rule, `eager` being PyTorch's result in the dtype of `actual`."""
    if actual.shape != exact.shape or eager.shape != exact.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)}, {tuple(exact.shape)}, {tuple(eager.shape)}")
    exact = exact.double()
    if exact.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0)
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    return Accuracy(error, eager_error, 2 * eager_error + ulp(exact.abs().max().item(), actual.dtype))


def assert_accurate(actual: Tensor, exact: Tensor, eager: Tensor) -> Accuracy:
    """Raise AssertionError, with the figures, where `actual` breaks the rule. NaN breaks it."""
    result = accuracy(actual, exact, eager)
    if not result.ok:
        raise AssertionError(str(result))
    return result
