"""Inline assembly for the interpreter: what `tl.inline_asm_elementwise` computes when there is no GPU.

Hints and scheduling (`prefetch`, `griddepcontrol`, `discard`, ...) do nothing. Everything else is run instruction by
instruction (`ptx`), so that a wrong constant in the text is a wrong result in the test. What `ptx` doesn't know can be
given an emulation with `register_asm`, keyed by the exact text, blanks aside; a kernel file can't import this package, so
emulations of the project's kernels belong at the end of this file.

With `pack` above 1 a thread's neighbouring elements share registers. Here neighbours are those of the last dimension; on a
GPU the layout decides, so assembly that mixes packed elements is right by luck only and `pack=1` is the safe choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from . import ptx

Emulation = Callable[..., Any]  # NumPy arrays, one for each operand -> an array, or a tuple of them

EMULATIONS: dict[str, Emulation] = {}
NO_OPERATION = [
    re.compile(r"^\{?\s*(?:@\S+\s+)?(?:prefetch\w*|griddepcontrol|discard|applypriority|nanosleep|cp\.async\.bulk\.prefetch)\b")
]


def normalize(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def register_asm(text: str) -> Callable[[Emulation], Emulation]:
    """Decorator: the function emulates exactly this assembly text (blanks aside)."""

    def register(function: Emulation) -> Emulation:
        EMULATIONS[normalize(text)] = function
        return function

    return register


def run(text: str, constraints: str, values: Sequence[np.ndarray], types: Sequence[tl.dtype], pack: int) -> list[np.ndarray]:
    """The results of the assembly, one array for each type. Raises NotImplementedError where nothing knows the text."""
    key = normalize(text)
    dtypes = [stock._get_np_dtype(kind.scalar) for kind in types]
    shape = np.broadcast_shapes(*(value.shape for value in values)) if values else (1,)
    if any(pattern.match(key) for pattern in NO_OPERATION):
        return [np.zeros(shape, dtype) for dtype in dtypes]
    if key in EMULATIONS:
        results = EMULATIONS[key](*values)
        results = results if isinstance(results, tuple) else (results,)
        return [np.asarray(result).astype(dtype) for result, dtype in zip(results, dtypes, strict=True)]
    outputs = sum(part.strip().startswith("=") for part in constraints.split(","))
    registers = [register for value in values for register in _to_registers(np.broadcast_to(value, shape), pack)]
    written = ptx.evaluate(text, outputs, registers)
    results, position = [], 0
    for dtype in dtypes:
        used = max(1, pack * dtype.itemsize // 4)
        results.append(_from_registers(written[position : position + used], dtype, pack, shape))
        position += used
    return results


def _to_registers(value: np.ndarray, pack: int) -> list[np.ndarray]:
    """Bit patterns of a lane's `pack` elements, 32 bits a register (or one element where it is wider)."""
    elements = np.ascontiguousarray(value).reshape(-1, pack)
    bits = elements.view(f"u{elements.dtype.itemsize}").astype(np.uint64)
    each = max(1, min(pack, 4 // elements.dtype.itemsize))
    width = np.uint64(8 * elements.dtype.itemsize)
    groups = [bits[:, start : start + each] for start in range(0, pack, each)]
    return [np.bitwise_or.reduce([group[:, i] << width * np.uint64(i) for i in range(group.shape[1])]) for group in groups]


def _from_registers(registers: Sequence[np.ndarray], dtype: np.dtype, pack: int, shape: tuple[int, ...]) -> np.ndarray:
    each = -(-pack // len(registers))
    width = np.uint64(8 * dtype.itemsize)
    bits = np.stack([registers[i // each] >> width * np.uint64(i % each) for i in range(pack)], axis=-1)
    return bits.astype(f"u{dtype.itemsize}").view(dtype).reshape(shape)
