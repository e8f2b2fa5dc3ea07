"""granite-kernels: IBM Granite 3.1 on one NVIDIA GPU, from PyTorch. Public names are resolved when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "GraniteConfig": "granite_kernels.model.config",
    "GraniteError": "granite_kernels.errors",
    "GraniteForCausalLM": "granite_kernels.model.model",
    "parse_tool_calls": "granite_kernels.model.tool_calls",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
