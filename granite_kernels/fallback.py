"""An operation of Triton's that PyTorch takes over where its kernel doesn't compile: on a machine without a C compiler, with a cache
that can't be written, with a Triton that refuses the code.

A kernel that doesn't compile has done nothing yet, so the same arguments go to the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from granite_kernels.errors import GraniteError

COMPILER = ("compiler", "runtime/build.py", "runtime/cache.py", "backends/nvidia/compiler.py")  # within the package of Triton


def _files(traceback: TracebackType | None) -> Iterator[str]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename
        traceback = traceback.tb_next


def is_of_the_compiler(error: Exception) -> bool:
    """Whether it was Triton's compiler, or what it builds and stores, that raised `error`, and not a kernel that ran."""
    import triton

    if isinstance(error, GraniteError | torch.OutOfMemoryError):
        return False
    package = Path(triton.__file__).parent
    return any(file.startswith(tuple(str(package / part) for part in COMPILER)) for file in _files(error.__traceback__))


class Guarded:
    """`kernel`, until it turns out not to compile; from then on `plain`, or GraniteError where `strict`."""

    def __init__(self, role: str, kernel: Callable[..., Any], plain: Callable[..., Any], *, strict: bool) -> None:
        self.role, self.kernel, self.plain, self.strict = role, kernel, plain, strict
        self.reason: str | None = None  # why not the kernel

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if self.reason is None:
            try:
                return self.kernel(*args, **keywords)
            except Exception as error:
                if not is_of_the_compiler(error):
                    raise
                said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
                reason = f"its kernel doesn't compile: {type(error).__name__}: {said}"[:300]
                if self.strict:
                    raise GraniteError(
                        f"backend 'triton' can't be honoured for {self.role}: {reason}; use backend='auto' or 'torch'"
                    ) from error
                self.reason = reason
            warnings.warn(f"{self.role} runs in plain PyTorch, since {self.reason}", RuntimeWarning, stacklevel=2)
        return self.plain(*args, **keywords)
