"""What others offer for an operation, a few lines each. What isn't installed is named as absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.weight import DENSE, Part, Weight, dense_matrix

from .harness import AbsentError, Inputs, Rival
from .shapes import Setting

PLAIN, CUBLAS, SDPA, LIGER = "granite-kernels, plain PyTorch", "cuBLAS product", "SDPA", "Liger"
GROUPED = "F.grouped_mm"


def liger(name: str, adapt: Callable[[Inputs], Inputs] | None = None, *, whole: bool = True, **keywords: Any) -> Rival:
    """Liger's function of that name, with our inputs as `adapt` lays them out."""

    def build() -> Callable[..., Any]:
        try:
            function = getattr(importlib.import_module("liger_kernel.transformers.functional"), name)
        except (ImportError, AttributeError) as error:
            raise AbsentError("liger-kernel is not installed") from error
        if not torch.cuda.is_available():
            raise AbsentError("Liger's kernels need a GPU")
        return lambda *args, **given: function(*args, **given, **keywords)

    return Rival(LIGER, build, adapt, whole)


def product(setting: Setting, x: int = 0, weight: int = 1) -> Rival:
    """The library's product alone, over the values of the weight in the dtype of x: what a fused operation has to be held against.
    `x` and `weight` are places among the operation's arguments.
    """

    def adapt(inputs: Inputs) -> Inputs:
        matrix = torch.cat([dense_matrix(part, setting.dtype) for part in inputs.args[weight].parts])
        return Inputs((inputs.args[x].reshape(-1, matrix.shape[1]), matrix.detach()))

    name = CUBLAS if setting.device.type == "cuda" else "PyTorch's product"
    return Rival(
        name if setting.format == DENSE else f"{name}, {setting.dtype}".replace("torch.", ""), lambda: F.linear, adapt, whole=False
    )


def laid_out(setting: Setting, op: Callable[..., Any], weight: int) -> tuple[Rival, ...]:
    """The plain path as a model on a CPU runs it: float32 matrices with their columns contiguous. Nothing on a GPU."""
    from granite_kernels.model.weights import prefers_column_major

    if setting.format != DENSE or not prefers_column_major(setting.device, setting.dtype, "auto"):
        return ()

    def adapt(inputs: Inputs) -> Inputs:
        parts = (Part(DENSE, (part.planes[0].detach().T.contiguous().T,), part.shape) for part in inputs.args[weight].parts)
        return Inputs((*inputs.args[:weight], Weight(*parts), *inputs.args[weight + 1 :]), inputs.keywords)

    return (Rival(PLAIN, lambda: op, adapt),)


def sdpa(setting: Setting) -> Rival:
    """PyTorch's scaled_dot_product_attention over exactly the slots in use, causal: FlashAttention or whatever PyTorch picks."""

    def adapt(inputs: Inputs) -> Inputs:
        q, k_cache, v_cache = inputs.args[:3]
        used = setting.held + setting.shape[1]
        k, v = (cache[:, :, :used] for cache in (k_cache, v_cache))
        causal = setting.shape[1] > 1
        return Inputs((q.transpose(1, 2), k, v), {"scale": inputs.keywords["scale"], "is_causal": causal, "enable_gqa": True})

    def attend(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **keywords).transpose(1, 2)

    return Rival(SDPA, lambda: attend, adapt)


def grouped(experts: int, run: Callable[..., Tensor]) -> Rival:
    """PyTorch's grouped product, which transformers' experts run on too. `run` gets the product as a function (x [choices, columns]
    sorted by expert, matrices [experts, rows, columns], chosen), and the matrices in the place of the operation's weight.
    """

    def product(x: Tensor, matrices: Tensor, chosen: Tensor) -> Tensor:
        counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, chosen.flatten().long(), torch.ones_like(chosen, dtype=torch.int32).flatten())
        return F.grouped_mm(x, matrices.transpose(-2, -1), offs=counts.cumsum(0).int())

    def adapt(inputs: Inputs) -> Inputs:
        x, weight, *rest = inputs.args
        matrix = dense_matrix(weight.parts[0], x.dtype).detach()
        return Inputs((x, matrix.view(experts, -1, matrix.shape[1]), *rest), inputs.keywords)

    return Rival(GROUPED, lambda: lambda *args, **keywords: run(product, *args, **keywords), adapt)
