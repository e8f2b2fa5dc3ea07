"""Arithmetic of Triton's interpreter put right: bfloat16, float8, rounding of casts, `tl.dot`, reductions, bf16 atomics.

The stock interpreter (3.6 to 3.9) keeps bfloat16 as uint16 and computes on those integers, truncates float32 to bfloat16
and wraps float8 instead of saturating. Here every such value is widened to float32 (exact), computed on, and rounded once
to nearest even: what one hardware instruction does. A reduction accumulates in float32 and rounds once, where hardware
rounds at every step, so kernels should widen before they reduce.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock

Handle = stock.TensorHandle
Builder = stock.InterpreterBuilder

FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
DOT_PRECISIONS = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> float32, exact."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of bfloat16, to nearest even; NaN becomes the quiet NaN that the hardware writes."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def float64_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float64 -> uint16 bit patterns of bfloat16, rounded once: by way of a float32 rounded to odd."""
    wide = np.ascontiguousarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        near = wide.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = np.isfinite(near) & (near.astype(np.float64) != wide) & (bits & 1 == 0)
    away = np.abs(near.astype(np.float64)) > np.abs(wide)  # rounded up in magnitude: the odd neighbour is below
    odd = np.where(away, bits - np.uint32(1), bits + np.uint32(1))
    return float32_to_bfloat16(np.where(inexact, odd, bits).astype(np.uint32).view(np.float32))


def float8_to_float32(bits: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8).copy()).view(FLOAT8[dtype]).float().numpy()


def float32_to_float8(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """float32 -> uint8 bit patterns, to nearest even and saturating (`cvt.rn.satfinite`)."""
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    largest = torch.finfo(FLOAT8[dtype]).max
    wide = torch.where(wide.isnan(), wide, wide.clamp(-largest, largest))
    return wide.to(FLOAT8[dtype]).view(torch.uint8).numpy()


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _is_float8(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar in FLOAT8


def widen(handle: Any) -> Any:
    """The handle with bfloat16 or float8 data as float32; any other handle as it is."""
    if _is_bfloat16(handle):
        return Handle(bfloat16_to_float32(handle.data), tl.float32)
    if _is_float8(handle):
        return Handle(float8_to_float32(handle.data, handle.dtype.scalar), tl.float32)
    return handle


def _narrow(values: np.ndarray) -> Any:
    return Handle(float32_to_bfloat16(values), tl.bfloat16)


def _convert(source: Any, target: tl.dtype, otherwise: Callable[[Any], Any]) -> Any:
    """A cast with bfloat16 or float8 on either side; `otherwise` does all others."""
    old, new = source.dtype.scalar, target.scalar
    if old == new:
        return Handle(source.data, new)
    if old == tl.bfloat16 or old in FLOAT8:
        wide = widen(source)
        return wide if new == tl.float32 else _convert(wide, target, otherwise)
    if new == tl.bfloat16:
        return _narrow(source.data.astype(np.float32))
    if new in FLOAT8:
        return Handle(float32_to_float8(source.data.astype(np.float32), new), new)
    return otherwise(source)


def _repair_elementwise() -> None:
    binary, unary, ternary, fma = Builder.binary_op, Builder.unary_op, Builder.ternary_op, Builder.create_fma

    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., np.ndarray]) -> Any:
        if _is_float8(left) or _is_float8(right):
            raise NotImplementedError("arithmetic on float8 operands: cast them first")
        if not (_is_bfloat16(left) or _is_bfloat16(right)):
            return binary(self, left, right, operation)
        result = operation(widen(left).data, widen(right).data)
        return Handle(result, tl.int1) if result.dtype == np.bool_ else _narrow(result)

    def unary_op(self: Any, argument: Any, operation: Callable[..., np.ndarray]) -> Any:
        return _narrow(operation(widen(argument).data)) if _is_bfloat16(argument) else unary(self, argument, operation)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, operation: Callable[..., np.ndarray]) -> Any:
        if operation is np.where or not any(map(_is_bfloat16, (a, b, c))):
            return ternary(self, a, b, c, operation)
        return _narrow(operation(widen(a).data, widen(b).data, widen(c).data))

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if _is_bfloat16(z):
            return Handle(float64_to_bfloat16(widen(x).data.astype(np.float64) * widen(y).data + widen(z).data), tl.bfloat16)
        if z.dtype.scalar == tl.float32:  # one rounding, as FFMA does
            return Handle((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), tl.float32)
        return fma(self, x, y, z)

    def get_bf16(self: Any, value: float) -> Any:  # a constant; the stock builder has none of this type
        return Handle(float32_to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    Builder.get_bf16 = get_bf16
    Builder.binary_op, Builder.unary_op, Builder.ternary_op = binary_op, unary_op, ternary_op
    Builder.create_fma = create_fma


def _repair_casts() -> None:
    cast, float_to_float = Builder.cast_impl, Builder.create_fp_to_fp
    ieee = {tl.float16, tl.float32, tl.float64}

    def cast_impl(self: Any, source: Any, target: tl.dtype) -> Any:
        return _convert(source, target, lambda handle: cast(self, handle, target))

    def create_fp_to_fp(self: Any, source: Any, target: tl.dtype, rounding: Any) -> Any:
        if rounding == stock._ir.ROUNDING_MODE.RTZ:
            return float_to_float(self, source, target, rounding)
        if {source.dtype.scalar, target.scalar} <= ieee:
            return Handle(source.data.astype(stock._get_np_dtype(target)), target.scalar)
        return _convert(source, target, lambda handle: float_to_float(self, handle, target, rounding))

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_dot() -> None:
    dot = Builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if not any(_is_bfloat16(handle) or _is_float8(handle) for handle in (a, b)):
            return dot(self, a, b, d, precision, imprecise)
        product = np.matmul(widen(a).data, widen(b).data) + d.data
        return Handle(product.astype(d.data.dtype), d.dtype.scalar)

    Builder.create_dot = create_dot
    options = stock.interpreter_builder.options
    type(options).allowed_dot_input_precisions = DOT_PRECISIONS
    object.__setattr__(options, "allowed_dot_input_precisions", DOT_PRECISIONS)  # a frozen dataclass


def _repair_atomics() -> None:
    rmw = Builder.create_atomic_rmw

    def create_atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if not _is_bfloat16(value):
            return rmw(self, operation, pointer, value, mask, sem, scope)
        if operation != stock._ir.ATOMIC_OP.FADD:
            raise NotImplementedError("the only atomic of bfloat16 is add")
        old = np.zeros(value.data.shape, np.uint16)
        for index in np.ndindex(value.data.shape):
            if mask.data[index]:
                cell = ctypes.c_uint16.from_address(int(pointer.data[index]))
                old[index] = cell.value
                pair = bfloat16_to_float32(np.array([old[index], value.data[index]], np.uint16))
                cell.value = int(float32_to_bfloat16(pair.sum(keepdims=True))[0])
        return Handle(old, tl.bfloat16)

    Builder.create_atomic_rmw = create_atomic_rmw


def _repair_reductions() -> None:
    original = stock.ReduceScanOpInterface.apply

    def apply(self: Any, operands: Any) -> Any:
        single = not isinstance(operands, tuple)
        inputs = (operands,) if single else operands
        halves = [isinstance(x, tl.tensor) and x.dtype.scalar == tl.bfloat16 for x in inputs]
        if not any(halves):
            return original(self, operands)
        wide = tuple(
            self.to_tensor(bfloat16_to_float32(x.handle.data), tl.float32) if half else x for x, half in zip(inputs, halves, strict=True)
        )
        results = list(original(self, wide))
        for position, (result, half) in enumerate(zip(results, halves, strict=False)):
            if half and result.dtype.scalar == tl.float32:
                kind = result.type.with_element_ty(tl.bfloat16) if result.type.is_block() else tl.bfloat16
                results[position] = tl.tensor(_narrow(result.handle.data), kind)
        return results[0] if single else tuple(results)

    stock.ReduceScanOpInterface.apply = apply


def repair() -> None:
    """Install every repair of this file; call it once (`interpreter.install` does)."""
    _repair_elementwise()
    _repair_casts()
    _repair_dot()
    _repair_atomics()
    _repair_reductions()
