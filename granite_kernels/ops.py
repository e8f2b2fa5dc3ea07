"""Ops: the operations a model runs on, one callable each, with the reason it was chosen.

A backend is this value and nothing else: falling back per operation, `model.kernels()` and running without a GPU are all it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from granite_kernels.errors import GraniteError
from granite_kernels.fallback import Guarded
from granite_kernels.workspace import Workspace

BACKENDS = ("auto", "triton", "torch")
Op = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One row of `model.kernels()`: the kernel that runs for a role and, where it isn't Triton's, why."""

    role: str
    kernel: str
    active: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Ops:
    """The operations of a Granite model. Signatures: granite_kernels/reference/."""

    embed: Op
    norm_qkv_rope_append: Op
    attention: Op
    attention_decode: Op
    linear_add: Op
    norm_gate_up_swiglu: Op
    norm_route: Op
    experts_gate_up_swiglu: Op
    experts_down_add: Op
    norm_logits: Op
    sample: Op
    sample_step: Op
    chosen: tuple[Choice, ...] = ()  # at load

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What runs now: a kernel that turned out not to compile has been replaced."""
        return tuple(self._now(choice) for choice in self.chosen)

    def _now(self, choice: Choice) -> Choice:
        reason = getattr(getattr(self, choice.role), "reason", None)
        return choice if reason is None else Choice(choice.role, choice.kernel.replace("kernels.", "reference.", 1), False, reason)

    @property
    def backend(self) -> str:
        """ "triton" where any operation is Triton's, else "torch"."""
        return "triton" if any(choice.active for choice in self.choices) else "torch"


# the file of each operation, below both reference/ and kernels/
FILES = {
    "embed": "embed",
    "norm_qkv_rope_append": "linear",
    "attention": "attention",
    "attention_decode": "attention_decode",
    "linear_add": "linear",
    "norm_gate_up_swiglu": "linear",
    "norm_route": "moe",
    "experts_gate_up_swiglu": "moe",
    "experts_down_add": "moe",
    "norm_logits": "linear",
    "sample": "sample",
    "sample_step": "sample",
}
NO_KERNEL = "there is no Triton kernel yet"
WITH_WORKSPACE = frozenset({"norm_qkv_rope_append", "attention_decode", "linear_add", "norm_gate_up_swiglu", "norm_logits"})


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels can't run for `dtype` on `device`; None where they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"kernels take float32, bfloat16 and float16, not {dtype}"
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"compute capability 8.0 or newer is needed, this GPU has {major}.{minor}"
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"Triton needs an NVIDIA GPU, the model is on {device.type}"


def choose(backend: str, device: torch.device, dtype: torch.dtype, *, moe: bool = False, workspace: Workspace | None = None) -> Ops:
    """The operations for a model of `dtype` on `device`; `moe` says whether it is a mixture of experts.

    "auto": Triton on a GPU, PyTorch elsewhere. "triton": Triton or a GraniteError. "torch": plain PyTorch. An operation without
    a Triton kernel is PyTorch's, and its row in `choices` says so; so does one whose kernel turns out not to compile when it is first
    called, but for "triton", where the call raises a GraniteError.
    """
    if backend not in BACKENDS:
        raise GraniteError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    reason = "asked for" if backend == "torch" else why_not_triton(device, dtype)
    if backend == "auto" and device.type != "cuda":
        reason = reason or "the interpreter is for tests; ask for backend='triton'"
    if backend == "triton" and reason is not None:
        raise GraniteError(f"backend 'triton' can't be honoured: {reason}; use backend='auto' or 'torch'")
    if backend == "triton" and moe:
        raise GraniteError(f"backend 'triton' can't be honoured: {NO_KERNEL} for experts; use backend='auto' or 'torch'")
    callables: dict[str, Op] = {}
    choices = []
    for role, file in FILES.items():
        op, why = (None, reason) if reason is not None else _kernel(role, file)
        if op is None:
            callables[role] = getattr(importlib.import_module(f"granite_kernels.reference.{file}"), role)
            if moe or file != "moe":
                choices.append(Choice(role, f"reference.{file}.{role}", False, why or ""))
            continue
        if role in WITH_WORKSPACE and workspace is not None:
            op = functools.partial(op, workspace=workspace)
        callables[role] = Guarded(
            role, op, getattr(importlib.import_module(f"granite_kernels.reference.{file}"), role), strict=backend == "triton"
        )
        choices.append(Choice(role, f"kernels.{file}.{role}", True, ""))
    return Ops(**callables, chosen=tuple(choices))


def _kernel(role: str, file: str) -> tuple[Op | None, str | None]:
    if file == "moe":
        return None, NO_KERNEL
    module = importlib.import_module(f"granite_kernels.kernels.{file}")
    return getattr(module, role), None
