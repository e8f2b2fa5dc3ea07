"""The seams to transformers. The other files here are the only ones that import it: nothing else pays the seconds that it takes.

view.py        our engine in the place of a model of theirs: pipeline, generate, lm-eval
engine.py      our engine over the weights of a model of theirs
decode.py      our decode loop in their generate
accelerate.py  forwards of ours in the instances of a model of theirs, with layer.py, session.py and window.py
status.py      what runs for each module
interfaces.py  attention and experts by name, in their tables of implementations
models.py      what we know of their models, and what keeps our hands off a module
"""

from __future__ import annotations

import importlib
from typing import Any

from granite_kernels.errors import GraniteError

OLDEST = (5, 15)  # of transformers that the seams were tried with


def import_hf(name: str) -> Any:
    """The module `name` of this package; a GraniteError where transformers isn't installed, or is too old."""
    oldest = ".".join(map(str, OLDEST))
    try:
        import transformers
    except ImportError as error:
        raise GraniteError(f'this needs transformers {oldest} or newer: pip install "granite-kernels[hf]"') from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise GraniteError(f"this needs transformers {oldest} or newer, found {transformers.__version__}: pip install -U transformers")
    return importlib.import_module(f"{__name__}.{name}")
