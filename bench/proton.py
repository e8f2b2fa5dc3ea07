"""The same request under Proton, Triton's profiler, which asks every launch for its bytes and flops (`launch_metadata`).

It takes the GPU's counters for itself, so it runs after torch's profiler and not beside it. `proton-viewer -m time/ms,gbyte/s FILE`
prints the tree: pass, layer, role, kernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from granite_kernels.errors import GraniteError

if TYPE_CHECKING:
    from granite_kernels.model.model import GraniteForCausalLM


def record(model: GraniteForCausalLM, prompt_tokens: int, new_tokens: int, path: Path) -> Path:
    """Write Proton's profile of one eager request; returns the file that it wrote. Raises GraniteError where Proton doesn't load."""
    try:
        from triton import profiler
    except ImportError as error:
        raise GraniteError(f"--proton needs triton.profiler, which doesn't load ({error}); leave it out, or install triton") from error

    from .profiling import request, some_ids

    stem = path.with_suffix("") if path.suffix == ".hatchet" else path
    session = profiler.start(str(stem), hook="triton")
    try:
        request(model, some_ids(model, prompt_tokens), new_tokens, profiler.scope)
    finally:
        profiler.finalize(session)
    return stem.with_name(stem.name + ".hatchet")
