"""Kernels examined without a GPU: repaired interpreter, memory traffic, races, compiled code, a static roofline.

The interpreter and the compiler can't share one process (`triton.jit` binds at import to what TRITON_INTERPRET says):
`interpreter`, `traffic` and `races` need TRITON_INTERPRET=1; `capture`, `sass` and `roofline` need it unset or 0.
Counts, registers, widths and spills come from the compiled code and are exact; times are a model and are named so.
"""

from .child import compiled

__all__ = ["compiled"]
