"""Weight formats: how a file stores a matrix, the planes that kernels read, and the way between them, bit for bit.

`get(name)` gives the one object of a format; a format's module is imported when it is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from granite_kernels.errors import GraniteError

if TYPE_CHECKING:
    from granite_kernels.formats.base import Format
    from granite_kernels.formats.coded import CodedFormat
    from granite_kernels.formats.gguf import GgufFormat

GGUF_NAMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
INT4_NAMES = ("int4_g32", "int4_g64", "int4_g128", "int4_g32_zero", "int4_g64_zero", "int4_g128_zero")
NAMES = (*GGUF_NAMES, "int8", *INT4_NAMES, "fp8")


@functools.cache
def get(name: str) -> Format:
    """The format called `name` (one of NAMES). Raises GraniteError for any other name."""
    if name not in NAMES:
        raise GraniteError(f"there is no weight format {name!r}; the formats are {', '.join(NAMES)}")
    module = "int4" if name in INT4_NAMES else name
    format: Format = importlib.import_module(f"granite_kernels.formats.{module}").FORMATS[name]
    return format


def get_gguf(name: str) -> GgufFormat:
    """The block format called `name` (one of GGUF_NAMES), which can also read and write a GGUF file's blocks."""
    from granite_kernels.formats.gguf import GgufFormat

    format = get(name)
    if not isinstance(format, GgufFormat):
        raise GraniteError(f"{name!r} is not a GGUF block format; those are {', '.join(GGUF_NAMES)}")
    return format


def get_coded(name: str) -> CodedFormat:
    """The format called `name` ("int8", "fp8", INT4_NAMES), which packs codes that stand beside their scales."""
    from granite_kernels.formats.coded import CodedFormat

    format = get(name)
    if not isinstance(format, CodedFormat):
        raise GraniteError(f"{name!r} is stored in blocks; codes beside scales are {', '.join(NAMES[len(GGUF_NAMES) :])}")
    return format
