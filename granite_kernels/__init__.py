"""granite-kernels: IBM Granite 3.1 on one NVIDIA GPU, from PyTorch.

Public names are resolved when they are first used, so that importing the package starts nothing and costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite_kernels.errors import GraniteError as GraniteError
    from granite_kernels.model.config import GraniteConfig as GraniteConfig
    from granite_kernels.model.dropin import accelerate as accelerate
    from granite_kernels.model.dropin import fast_decode as fast_decode
    from granite_kernels.model.dropin import register as register
    from granite_kernels.model.dropin import restore as restore
    from granite_kernels.model.dropin import status as status
    from granite_kernels.model.model import GraniteForCausalLM as GraniteForCausalLM
    from granite_kernels.model.tool_calls import parse_tool_calls as parse_tool_calls

_HOMES = {
    "GraniteConfig": "model.config",
    "GraniteError": "errors",
    "GraniteForCausalLM": "model.model",
    "accelerate": "model.dropin",
    "fast_decode": "model.dropin",
    "parse_tool_calls": "model.tool_calls",
    "register": "model.dropin",
    "restore": "model.dropin",
    "status": "model.dropin",
}

__all__ = [
    "GraniteConfig",
    "GraniteError",
    "GraniteForCausalLM",
    "__version__",
    "accelerate",
    "fast_decode",
    "parse_tool_calls",
    "register",
    "restore",
    "status",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("granite-kernels")
        except PackageNotFoundError:  # a checkout into which nothing was installed, as in `make gpu`
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
