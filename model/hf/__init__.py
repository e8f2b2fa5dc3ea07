"""The seams to transformers. The other files here are the only ones that import it: nothing else pays the seconds that it takes.

view.py        our engine in the place of a model of theirs: pipeline, generate, lm-eval
"""

from __future__ import annotations

import importlib
from typing import Any

from granite_kernels.errors import GraniteError


def import_hf(name: str) -> Any:
    """The module `name` of this package; a GraniteError where transformers isn't installed."""
    try:
        import transformers  # noqa: F401  (only to tell its absence from that of something else)
    except ImportError as error:
        raise GraniteError('this needs transformers 5: pip install "granite-kernels[hf]"') from error
    return importlib.import_module(f"{__name__}.{name}")
