"""Every operation has the same signature in reference/ and in kernels/, a trailing `workspace` excepted."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from granite_kernels.ops import FILES

PUBLIC = {
    "norm": ("rms_norm", "add_rms_norm"),
    "rope": ("rope_append",),
    "swiglu": ("swiglu",),
    "embed": ("embed",),
    "sample": ("sample", "sample_step"),
    "attention": ("attention",),
    "attention_decode": ("attention_decode",),
    "linear": ("linear", "linear_add", "norm_qkv_rope_append", "norm_gate_up_swiglu", "norm_logits"),
}
PENDING = ("norm_route", "experts_gate_up_swiglu", "experts_down_add")  # kernels still to be written


def parameters(op: Callable[..., Any]) -> list[tuple[str, str, Any, str]]:
    found = inspect.signature(op).parameters.values()
    return [(p.name, str(p.kind), p.default, str(p.annotation)) for p in found if p.name != "workspace"]


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in PUBLIC.items() for name in names])
def test_signatures_are_equal(file: str, name: str) -> None:
    kernel, reference = (getattr(importlib.import_module(f"granite_kernels.{kind}.{file}"), name) for kind in ("kernels", "reference"))
    assert parameters(kernel) == parameters(reference)
    assert inspect.signature(kernel).return_annotation == inspect.signature(reference).return_annotation
    assert kernel.__doc__


def test_every_role_of_a_model_is_public_or_pending() -> None:
    assert set(FILES) <= {name for names in PUBLIC.values() for name in names} | set(PENDING)
    for name in PENDING:
        assert hasattr(importlib.import_module("granite_kernels.reference.moe"), name)
