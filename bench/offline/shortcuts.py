"""Triton's interpreter without what it does over and over: a kernel takes a quarter of the time, with the same bits.

A small operation costs the stock interpreter a tenth of a millisecond of Python: it checks integers for overflow by a dozen of
Triton's own operations, describes the same shapes and types anew, and patches `triton.language` at every call of a device function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock


def take() -> None:
    _patch_language_once()
    _check_overflow_in_numpy()
    _keep_types()


def _patch_language_once() -> None:
    patched: set[frozenset[int]] = set()
    launch = stock.GridExecutor.__call__

    def grid_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    def device_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = getattr(self, "_language_modules", None)
        if modules is None:
            found = (value for value in self.fn.__globals__.values() if inspect.ismodule(value))
            modules = self._language_modules = frozenset(id(value) for value in found if value in (tl, tl.core))
        if modules not in patched:
            stock._patch_lang(self.fn)
            patched.add(modules)
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise stock.InterpreterError(repr(error)) from error

    stock.GridExecutor.__call__ = grid_call
    stock.InterpretedFunction.__call__ = device_call


def _check_overflow_in_numpy() -> None:
    exactly = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> None:
        kind = left.type.scalar
        if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        exact = exactly[operation.__name__](*(side.handle.data.astype(np.int64) for side in (left, right)))
        if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
            raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _keep_types() -> None:
    """Block types, and what a tensor derives from its type, are made once; so is NumPy's type for each of Triton's."""
    block, tensor, numpy_type = tl.block_type.__init__, tl.tensor.__init__, stock._get_np_dtype
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    numpy_types: dict[str, np.dtype[Any]] = {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, getattr(element_ty, "address_space", None), *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        key = type.name
        if key not in tensors:
            tensor(self, handle, type)
            tensors[key] = dict(self.__dict__)
        self.__dict__.update(tensors[key], handle=handle, type=type, dtype=type.scalar)

    def get_numpy_type(triton_type: Any) -> np.dtype[Any]:
        key = triton_type.name
        if key not in numpy_types:
            numpy_types[key] = numpy_type(triton_type)
        return numpy_types[key]

    tl.block_type.__init__, tl.tensor.__init__, stock._get_np_dtype = block_init, tensor_init, get_numpy_type
