"""An interpreter of straight-line PTX, so that inline assembly itself is tested and not a retelling of it.

`evaluate(text, ...)` runs the instructions over NumPy arrays, one lane an element: integer and logical operations, shifts,
`lop3`, `prmt`, `dp4a`, packs and unpacks by `mov`, fused multiply-add in float32, f16x2 and bf16x2, conversions between
those, and the approximate functions (computed exactly). No branches, no memory. Registers hold bit patterns in uint64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from . import numerics

Bits = np.ndarray  # uint64
OPERAND = re.compile(r"\{[^}]*\}|[^,\s][^,]*")
APPROXIMATE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
LOGICAL: dict[str, Callable[[Bits, Bits], Bits]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _width(kind: str) -> int:
    """Bits of a PTX type, as `s32`, `bf16x2`, `pred`."""
    if kind == "pred":
        return 1
    found = re.fullmatch(r"(?:b|u|s|f|bf)(\d+)(x2)?", kind)
    if found is None:
        raise NotImplementedError(f"PTX type .{kind}")
    return int(found[1]) * (2 if found[2] else 1)


def _masked(bits: Bits, width: int) -> Bits:
    return bits if width == 64 else bits & np.uint64((1 << width) - 1)


def _signed(bits: Bits, width: int) -> np.ndarray:
    left: np.ndarray = (bits << np.uint64(64 - width)).view(np.int64)
    result: np.ndarray = left >> np.int64(64 - width)
    return result


def _integer(bits: Bits, kind: str) -> np.ndarray:
    return _signed(bits, _width(kind)) if kind[0] == "s" else _masked(bits, _width(kind)).view(np.int64)


def _float(bits: Bits, kind: str) -> np.ndarray:
    """The value of a bit pattern in float64."""
    if kind == "f32":
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    if kind == "bf16":
        return numerics.bfloat16_to_float32(bits.astype(np.uint16)).astype(np.float64)
    raise NotImplementedError(f"PTX arithmetic on .{kind}")


def _pattern(values: np.ndarray, kind: str) -> Bits:
    """float64 -> bit pattern, rounded once to nearest even."""
    with np.errstate(over="ignore"):
        if kind == "f32":
            return values.astype(np.float32).view(np.uint32).astype(np.uint64)
        if kind == "f16":
            return values.astype(np.float16).view(np.uint16).astype(np.uint64)
        if kind == "bf16":
            return numerics.float64_to_bfloat16(values).astype(np.uint64)
    raise NotImplementedError(f"PTX arithmetic on .{kind}")


def _by_lane(kind: str, function: Callable[..., np.ndarray], operands: Sequence[Bits]) -> Bits:
    """A floating-point function on one value, or on both halves of a packed pair."""
    if not kind.endswith("x2"):
        return _pattern(function(*(_float(operand, kind) for operand in operands)), kind)
    half = kind.removesuffix("x2")
    low = _by_lane(half, function, [operand & np.uint64(0xFFFF) for operand in operands])
    high = _by_lane(half, function, [operand >> np.uint64(16) & np.uint64(0xFFFF) for operand in operands])
    return _pair(low, high)


def _pair(low: Bits, high: Bits) -> Bits:
    both: Bits = low | high << np.uint64(16)
    return both


def _lop3(a: Bits, b: Bits, c: Bits, table: int) -> Bits:
    result = np.zeros_like(a)
    for term in range(8):
        if table >> term & 1:
            result |= (a if term & 4 else ~a) & (b if term & 2 else ~b) & (c if term & 1 else ~c)
    return result


def _prmt(a: Bits, b: Bits, selector: Bits) -> Bits:
    source = a & np.uint64(0xFFFFFFFF) | b << np.uint64(32)
    result = np.zeros_like(a)
    for position in range(4):
        choice = selector >> np.uint64(4 * position)
        byte = source >> ((choice & np.uint64(7)) * np.uint64(8)) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result |= np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * position)
    return result


def _dp4a(a: Bits, b: Bits, c: Bits, kind_a: str, kind_b: str) -> Bits:
    total = _signed(c, 32).copy()
    for position in range(4):
        shift = np.uint64(8 * position)
        total += _integer(a >> shift, kind_a[0] + "8") * _integer(b >> shift, kind_b[0] + "8")
    return total.view(np.uint64)


def _convert(parts: list[str], operands: list[Bits]) -> Bits:
    """`cvt[.modes].to.from`; with two sources the first goes to the high half."""
    target, source = parts[-2], parts[-1]
    if target.endswith("x2"):
        half = target.removesuffix("x2")
        upper, lower = (_pattern(_float(operand, source), half) for operand in operands)
        return _pair(lower, upper)
    is_float, from_float = "f" in target, "f" in source
    value = _float(operands[0], source) if from_float else _integer(operands[0], source)
    if is_float:
        return _pattern(value.astype(np.float64), target)
    if not from_float:
        return value.view(np.uint64)
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    whole = rounding[next(part for part in parts if part in rounding)](np.nan_to_num(value))
    least, span = (-(2 ** (_width(target) - 1)) if target[0] == "s" else 0), 2 ** _width(target) - 1
    clipped: np.ndarray = np.clip(whole, least, least + span).astype(np.int64)
    return clipped.view(np.uint64)


def _compute(name: str, parts: list[str], operands: list[Bits]) -> Bits:
    """One instruction's result. `parts` are the modifiers after the name, the type last."""
    kind = parts[-1]
    if name == "cvt":
        return _convert(parts, operands)
    if name == "lop3":
        return _lop3(operands[0], operands[1], operands[2], int(operands[3].flat[0]))
    if name == "prmt":
        return _prmt(operands[0], operands[1], operands[2])
    if name == "dp4a":
        return _dp4a(operands[0], operands[1], operands[2], parts[0], parts[1])
    if name in LOGICAL:
        return LOGICAL[name](operands[0], operands[1])
    if name == "not":
        return ~operands[0]
    if name == "shl":
        return np.where(operands[1] < np.uint64(_width(kind)), operands[0] << (operands[1] & np.uint64(63)), np.uint64(0))
    if name == "shr":
        amount = np.minimum(operands[1], np.uint64(_width(kind) - (kind[0] == "s"))).view(np.int64)
        return np.where(amount < 64, _integer(operands[0], kind) >> np.minimum(amount, 63), 0).view(np.uint64)
    if name in APPROXIMATE:
        with np.errstate(divide="ignore", invalid="ignore"):
            return _by_lane(kind, APPROXIMATE[name], operands)
    arithmetic: dict[str, Callable[..., np.ndarray]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "mad": lambda a, b, c: a * b + c,
        "fma": lambda a, b, c: a * b + c,
        "min": np.minimum,
        "max": np.maximum,
        "neg": np.negative,
        "abs": np.abs,
    }
    if name not in arithmetic or "wide" in parts or "hi" in parts:
        raise NotImplementedError(f"PTX instruction {'.'.join([name, *parts])}")
    if "f" in kind:
        return _by_lane(kind, arithmetic[name], operands)
    return arithmetic[name](*(_integer(operand, kind) for operand in operands)).astype(np.int64).view(np.uint64)


def evaluate(text: str, outputs: int, values: Sequence[np.ndarray]) -> list[Bits]:
    """Run assembly whose `$0`... are `outputs` results and then `values` (bit patterns, uint64, one shape) -> the results.

    Raises NotImplementedError for an instruction that it doesn't know, by name.
    """
    shape = np.broadcast_shapes(*(value.shape for value in values)) if values else (1,)
    registers: dict[str, Bits] = {f"${outputs + position}": np.broadcast_to(value, shape) for position, value in enumerate(values)}
    body = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.S)
    for statement in _statements(body):
        operation, _, rest = statement.partition(" ")
        name, *parts = operation.split(".")
        target, *sources = [operand.strip() for operand in OPERAND.findall(rest)]
        if name == "mov" and target.startswith("{"):
            _unpack(registers, target, _read(registers, sources[0], shape), _width(parts[-1]))
        elif name == "mov" and sources[0].startswith("{"):
            members = _members(sources[0])
            step = _width(parts[-1]) // len(members)
            packed = [
                _masked(_read(registers, member, shape), step) << np.uint64(step * position) for position, member in enumerate(members)
            ]
            registers[target] = np.bitwise_or.reduce(packed)
        elif name == "mov":
            registers[target] = _masked(_read(registers, sources[0], shape), _width(parts[-1]))
        else:
            result = _compute(name, parts, [_read(registers, source, shape) for source in sources])
            kind = parts[-2] if name == "cvt" else ("b32" if name == "dp4a" else parts[-1])
            registers[target] = _masked(result, _width(kind))
    return [registers[f"${position}"] for position in range(outputs)]


def _statements(body: str) -> list[str]:
    """Instructions without declarations and scope braces; a brace that encloses operands stays."""
    body = re.sub(r"^\s*\{|\}\s*$", " ", body.strip())
    statements = [re.sub(r"\s+", " ", statement).strip() for statement in body.split(";")]
    return [statement for statement in statements if statement and not statement.startswith(".reg")]


def _members(group: str) -> list[str]:
    return [member.strip() for member in group.strip("{} ").split(",")]


def _unpack(registers: dict[str, Bits], target: str, bits: Bits, width: int) -> None:
    members = _members(target)
    step = width // len(members)
    for position, member in enumerate(members):
        registers[member] = _masked(bits >> np.uint64(step * position), step)


def _read(registers: dict[str, Bits], operand: str, shape: tuple[int, ...]) -> Bits:
    if operand in registers:
        return registers[operand]
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
        return np.full(shape, int(found[1], 16), np.uint64)
    try:
        return np.full(shape, int(operand.rstrip("U"), 0) % 2**64, np.uint64)
    except ValueError:
        raise NotImplementedError(f"PTX operand {operand}, which nothing has set") from None
