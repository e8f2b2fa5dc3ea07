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
WITH_WORKSPACE = frozenset(
    {"norm_qkv_rope_append", "attention_decode", "linear_add", "norm_gate_up_swiglu", "experts_down_add", "norm_logits"}
)


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

    "auto": Triton on a GPU, PyTorch elsewhere. "triton": Triton or a GraniteError. "torch": plain PyTorch. An operation whose kernel
    turns out not to compile when it is first called becomes PyTorch's, and its row in `choices` says so, but for "triton", where the
    call raises a GraniteError.
    """
    if backend not in BACKENDS:
        raise GraniteError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    reason = "asked for" if backend == "torch" else why_not_triton(device, dtype)
    if backend == "auto" and device.type != "cuda":
        reason = reason or "the interpreter is for tests; ask for backend='triton'"
    if backend == "triton" and reason is not None:
        raise GraniteError(f"backend 'triton' can't be honoured: {reason}; use backend='auto' or 'torch'")
    package = "kernels" if reason is None else "reference"
    callables: dict[str, Op] = {}
    choices = []
    for role, file in FILES.items():
        op: Op = getattr(importlib.import_module(f"granite_kernels.{package}.{file}"), role)
        if reason is None and role in WITH_WORKSPACE and workspace is not None:
            op = functools.partial(op, workspace=workspace)
        if reason is None:
            plain = getattr(importlib.import_module(f"granite_kernels.reference.{file}"), role)
            op = Guarded(role, op, plain, strict=backend == "triton")
        callables[role] = op
        if moe or file != "moe":
            choices.append(Choice(role, f"{package}.{file}.{role}", reason is None, reason or ""))
    return Ops(**callables, chosen=tuple(choices))
