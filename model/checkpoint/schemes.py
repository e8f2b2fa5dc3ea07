"""Which reader a checkpoint's quantization_config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from granite_kernels.errors import GraniteError

from .base import DENSE_FORMATS
from .compressed_tensors import CompressedTensors
from .folder import read_json
from .gptq import Awq, Gptq
from .layout import EMBEDDING, HEAD
from .prequantized import ROUNDED, Prequantized

READERS: dict[str, type[Prequantized]] = {"compressed-tensors": CompressedTensors, "gptq": Gptq, "awq": Awq}
BESIDE = "quantize_config.json"  # where AutoGPTQ wrote its settings


def scheme(raw: dict[str, Any], path: Path, dtype: torch.dtype) -> Prequantized | None:
    """The reader for the folder of the config.json `path`, whose content is `raw`; None where its weights are dense.

    Raises GraniteError for a method that isn't supported, naming it.
    """
    settings = raw.get("quantization_config") or raw.get("compression_config")
    beside = path.parent / BESIDE
    if not settings and beside.is_file():
        settings = {"quant_method": "gptq", **read_json(beside)}
        path = beside
    if not settings:
        return None
    method = (
        settings.get("quant_method", "compressed-tensors" if "config_groups" in settings else None) if isinstance(settings, dict) else None
    )
    if not isinstance(method, str) or method not in READERS:
        raise GraniteError(
            f"{path}: quantization_config has the method {method!r}; expected {', '.join(READERS)}, "
            f"or {', '.join(DENSE_FORMATS)} weights, or a GGUF file"
        )
    reader, rounded = READERS[method](settings, path, dtype), raw.get(ROUNDED, [])
    if not isinstance(rounded, list) or not set(rounded) <= {EMBEDDING, HEAD}:
        raise GraniteError(f"{path}: {ROUNDED} is {str(rounded)[:60]}; expected a list of {EMBEDDING} and {HEAD}")
    reader.rounded = frozenset(rounded)
    return reader
