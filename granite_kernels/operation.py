"""A kernel's torch operation: the dispatcher's to whoever traces or records, its body at once to everybody else.

For an operation that is written in Python the dispatcher takes the host some ten times as long as the launch behind it, which
decides how fast a step of small launches runs where no graph is captured: under transformers' generate. Without gradients, outside
a compiler and with plain tensors it has nothing to add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def direct(tensor: Any) -> bool:
    """Whether the body may run by itself: nothing differentiates, compiles, fakes or profiles it."""
    if torch.is_grad_enabled() or type(tensor) not in PLAIN or torch.compiler.is_compiling():
        return False
    return not torch.autograd.profiler._is_profiler_enabled


class Operation:
    """`body` under a name that torch knows; what its first argument is decides the way."""

    def __init__(self, body: Callable[..., Any], name: str, mutates_args: Iterable[str]) -> None:
        self.body, self.registered = body, torch.library.custom_op(name, body, mutates_args=mutates_args)
        functools.update_wrapper(self, body)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        return self.registered.register_fake(fake)

    def __call__(self, tensor: Tensor | None, *arguments: Any) -> Any:
        return (self.body if direct(tensor) else self.registered)(tensor, *arguments)


def operation(name: str, *, mutates_args: Iterable[str]) -> Callable[[Callable[..., Any]], Operation]:
    """As torch.library.custom_op, whose schema is read from the annotations."""
    return lambda body: Operation(body, name, mutates_args)
