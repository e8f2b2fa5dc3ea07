"""A whole model under `capture`: its tensors lie in the CPU's memory and say that they are on the GPU.

    with capture(90) as launches, on_gpu():
        model = GraniteForCausalLM(config, weights, backend="triton")
        model.generate(ids, max_new_tokens=8)

Everything that the model would do on a GPU happens, its captured step included, and nothing is computed: kernels are compiled and
recorded, products by the library return memory as it is, and a graph's replay does nothing. So a model of any size runs through at
the cost of its Python, as long as its large tensors come from `torch.zeros` or `torch.empty`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GPU = torch.device("cuda", 0)
MADE = (*((torch, name) for name in ("empty", "zeros", "ones", "full", "arange", "tensor", "as_tensor", "rand")), (Tensor, "to"))


def _on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with the CPU in place of a GPU among its arguments."""

    def cpu(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device | str) and str(value).startswith("cuda") else value

    @functools.wraps(function)
    def made(*args: Any, **keywords: Any) -> Tensor:
        return function(*map(cpu, args), **{name: cpu(value) for name, value in keywords.items()})

    return made


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)


def _addmm(rows: Tensor, x: Tensor, matrix: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype)


class _Stub:
    """A stream or a graph, to be waited for and replayed."""

    cuda_stream = 0

    def wait_stream(self, other: object) -> None:
        pass

    def replay(self) -> None:
        pass


CUDA: dict[str, Callable[..., Any]] = {
    "Stream": _Stub,
    "CUDAGraph": _Stub,
    "current_stream": lambda *args: _Stub(),
    "stream": lambda *args: contextlib.nullcontext(),
    "graph": lambda *args, **keywords: contextlib.nullcontext(),
    "mem_get_info": lambda *args: (80 << 30, 80 << 30),
}


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """Inside, tensors are "on the GPU". To be entered within `capture`, whose stub of torch.cuda it completes."""
    changes: list[tuple[Any, str, Any]] = [(torch.cuda, name, stub) for name, stub in CUDA.items()]
    changes += [(owner, name, _on_cpu(getattr(owner, name))) for owner, name in MADE]
    changes += [(F, "linear", _linear), (torch, "addmm", _addmm)]
    with contextlib.ExitStack() as undo:
        for owner, name, value in changes:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        torch.Tensor.device = property(lambda tensor: GPU)  # type: ignore[assignment]  # it hides the C type's own
        undo.callback(delattr, torch.Tensor, "device")
        yield
