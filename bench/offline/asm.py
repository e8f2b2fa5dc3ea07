"""Inline assembly for the interpreter: what `tl.inline_asm_elementwise` computes when there is no GPU.

Hints and scheduling (`prefetch...`, `griddepcontrol...`, `discard...`) do nothing here. Other texts are looked up, blanks
aside, among the emulations registered with `register_asm`. A kernel file can't import this package, so emulations of the
project's kernels live here, keyed by the exact text that the kernel passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

Emulation = Callable[..., Any]  # NumPy arrays, one for each operand -> an array, or a tuple of them

EMULATIONS: dict[str, Emulation] = {}
NO_OPERATION = [re.compile(r"^\{?\s*(?:@\S+\s+)?(?:prefetch\w*|griddepcontrol|discard)\b")]


def normalize(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def register_asm(text: str) -> Callable[[Emulation], Emulation]:
    """Decorator: the function emulates exactly this assembly text (blanks aside)."""

    def register(function: Emulation) -> Emulation:
        EMULATIONS[normalize(text)] = function
        return function

    return register


def ignore_asm(pattern: str) -> None:
    """Assembly whose text matches this regular expression at its start does nothing."""
    NO_OPERATION.append(re.compile(pattern))


def is_ignored(text: str) -> bool:
    return any(pattern.match(normalize(text)) for pattern in NO_OPERATION)


def find(text: str) -> Emulation:
    try:
        return EMULATIONS[normalize(text)]
    except KeyError:
        raise NotImplementedError(f"inline assembly without emulation, see bench/offline/asm.py: {text!r}") from None


def _dot_of_bytes(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind_a: type, kind_b: type) -> np.ndarray:
    a, b, c = np.broadcast_arrays(a, b, c)
    left = np.ascontiguousarray(a).view(kind_a).astype(np.int64).reshape(*a.shape, 4)
    right = np.ascontiguousarray(b).view(kind_b).astype(np.int64).reshape(*b.shape, 4)
    return (c.astype(np.int64) + (left * right).sum(-1)).astype(np.int32)


@register_asm("dp4a.s32.s32 $0, $1, $2, $3;")
def _dp4a_signed(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return _dot_of_bytes(a, b, c, np.int8, np.int8)


@register_asm("dp4a.u32.s32 $0, $1, $2, $3;")
def _dp4a_unsigned(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return _dot_of_bytes(a, b, c, np.uint8, np.int8)
