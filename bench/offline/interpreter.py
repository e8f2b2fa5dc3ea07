"""Repairs of Triton's interpreter (TRITON_INTERPRET=1; Triton 3.6 to 3.9), so that kernels can be judged on a CPU.

`install()` puts right what the stock interpreter computes wrongly without a word (`numerics`), teaches it inline assembly
(`asm`), libdevice and programmatic dependent launch (no-ops), and makes it several times as fast (`shortcuts`). It changes Triton
for the whole process, which is why tests and `bench/offline` alone call it.
What it can't see: warps, shared memory, `num_stages`, cache hints. Every kernel must also be compiled (`capture`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

from . import asm, numerics, shortcuts
from .asm import register_asm

__all__ = ["install", "register_asm"]

Handle = stock.TensorHandle
Builder = stock.InterpreterBuilder


def _erf(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = torch.erf(torch.from_numpy(np.asarray(x))).numpy()
    return result


def _round_away(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.trunc(x + np.copysign(0.5, x))
    return result


LIBDEVICE: dict[str, Callable[..., Any]] = {
    **{function.__name__: function for function in (np.tanh, np.exp, np.exp2, np.log, np.log2, np.log1p, np.expm1, np.sqrt)},
    **{function.__name__: function for function in (np.sin, np.cos, np.sinh, np.cosh, np.floor, np.ceil, np.trunc, np.rint)},
    **{function.__name__: function for function in (np.fmin, np.fmax, np.copysign, np.isnan)},
    **{"pow": np.power, "fabs": np.abs, "atan2": np.arctan2, "erf": _erf, "round": _round_away},
    **{"rsqrt": lambda x: 1 / np.sqrt(x), "fdividef": np.divide, "fast_dividef": np.divide},
    **{"fast_expf": np.exp, "fast_tanhf": np.tanh},
}


class _Results:
    """What an assembly operation returns: Triton asks for its results one by one."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def _repair_external() -> None:
    def create_inline_asm(self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
        results = asm.run(text, constraints, [value.data for value in values], types, pack)
        return _Results([Handle(result, kind.scalar) for result, kind in zip(results, types, strict=True)])

    def create_extern_elementwise(self: Any, library: str, path: str, symbol: str, args: Any, result: Any, pure: bool) -> Any:
        name = symbol.removeprefix("__nv_")
        name = name if name in LIBDEVICE else name.removesuffix("f")
        if name not in LIBDEVICE:
            raise NotImplementedError(f"libdevice function without emulation, see bench/offline/interpreter.py: {symbol}")
        return Handle(_as(LIBDEVICE[name](*[arg.data for arg in args]), result), result.scalar)

    Builder.create_inline_asm = create_inline_asm
    Builder.create_extern_elementwise = create_extern_elementwise
    Builder.create_grid_dependency_wait = lambda self: None
    Builder.create_grid_dependency_launch_dependents = lambda self: None
    _bind_cuda_builtins()


def _as(values: Any, kind: tl.dtype) -> np.ndarray:
    return np.asarray(values).astype(stock._get_np_dtype(kind))


def _bind_cuda_builtins() -> None:
    """`tl.extra.cuda` and libdevice find the interpreter's semantic, as `tl` itself does."""
    from triton.language.extra import cuda, libdevice
    from triton.language.extra.cuda import gdc
    from triton.language.extra.cuda import libdevice as cuda_libdevice

    def bind(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = stock.interpreter_semantic
            return function(*args, **kwargs)

        return bound

    for module in (cuda, gdc, cuda_libdevice):
        for name, function in inspect.getmembers(module, tl.core.is_builtin):
            setattr(module, name, bind(function))
    for name, _ in inspect.getmembers(libdevice, inspect.isfunction):
        if hasattr(cuda_libdevice, name):
            setattr(libdevice, name, getattr(cuda_libdevice, name))


def _repair_index() -> None:
    """3.6 turns a scalar into an int by a conversion that NumPy 2.4 refuses for arrays of one element."""
    original = stock._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        scope[-1].set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    stock._patch_lang_tensor = patch


@functools.cache
def install() -> None:
    """Repair the interpreter of this process; a second call does nothing. Raises RuntimeError in a compiling process."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("the repairs need TRITON_INTERPRET=1 in the environment before triton is imported")
    numerics.repair()
    _repair_external()
    if triton.__version__.startswith("3.6."):
        _repair_index()
    shortcuts.take()
