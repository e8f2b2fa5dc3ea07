"""Every operation has the same signature in reference/ and in kernels/, a trailing `workspace` excepted."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from granite_kernels import reference
from granite_kernels.ops import FILES

STEPS = {"product", "slow_in_16_bits", "rotary_table", "rotate", "append", "visible"}  # of the reference's own, no operations


def operations(module: ModuleType) -> list[str]:
    """The public functions that the module defines itself."""
    own = [name for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
    return [name for name in own if not name.startswith("_")]


FOUND = {
    name: file
    for file in (module.name for module in pkgutil.iter_modules(reference.__path__))
    for name in operations(importlib.import_module(f"granite_kernels.reference.{file}"))
    if name not in STEPS
}


def parameters(op: Callable[..., Any]) -> list[tuple[str, str, Any, str]]:
    found = list(inspect.signature(op).parameters.values())
    if found[-1].name == "workspace":
        found.pop()
    return [(p.name, str(p.kind), p.default, str(p.annotation)) for p in found]


@pytest.mark.parametrize("name", sorted(FOUND))
def test_signatures_are_equal(name: str) -> None:
    kernel, plain = (getattr(importlib.import_module(f"granite_kernels.{kind}.{FOUND[name]}"), name) for kind in ("kernels", "reference"))
    assert parameters(kernel) == parameters(plain)
    assert inspect.signature(kernel).return_annotation == inspect.signature(plain).return_annotation
    assert kernel.__doc__


def test_every_role_of_a_model_is_an_operation() -> None:
    assert {role: FOUND[role] for role in FILES} == FILES
