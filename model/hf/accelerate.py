"""accelerate and restore: our forwards in the instances of one model; nothing else of it, and no other model, changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from granite_kernels.errors import GraniteError
from granite_kernels.ops import BACKENDS

from .layer import Forward, HeadForward, LayerForward, NormForward
from .models import causal_lm, sizes, why_not, why_not_linear
from .session import Session
from .status import GRADIENTS, STOCK, status


def accelerate(model: Any, *, backend: str, strict: bool) -> Any:
    if backend not in BACKENDS:
        raise GraniteError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    lm = causal_lm(model)
    restore(lm)
    session = Session(backend, sizes(lm))
    session.kit(lm.model.norm.weight)  # raises where an explicit backend can't be honoured
    for module, kind in _targets(lm):
        module.__dict__["forward"] = kind(module, session)
    left = [row for row in status(lm) if not row.active and row.module != GRADIENTS and row.reason != "asked for"]
    stock = [row for row in left if row.kernel == STOCK]
    if strict and stock:
        restore(lm)
        raise GraniteError(f"{stock[0].module} can't be accelerated: {stock[0].reason}; strict=False leaves it to transformers")
    if left:
        more = f", and {len(left) - 1} more rows" if len(left) > 1 else ""
        warnings.warn(
            f"{left[0].module} runs on {left[0].kernel}: {left[0].reason}{more}; granite_kernels.status(model) has them all", stacklevel=3
        )
    return model


def restore(model: Any) -> Any:
    lm = causal_lm(model)
    for module in lm.modules():
        ours = module.__dict__.get("forward")
        if isinstance(ours, Forward):
            ours.session.active = False  # for whoever still holds it
            if ours.before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = ours.before
    return model


def _targets(lm: Any) -> Iterator[tuple[nn.Module, type[Forward]]]:
    """The modules that get a forward of ours: those in whose place nothing else stands."""
    for layer in lm.model.layers:
        if why_not(layer) is None:
            yield layer, LayerForward
    if why_not(lm.model.norm) is None:
        yield lm.model.norm, NormForward
    if why_not_linear(lm.lm_head) is None:
        yield lm.lm_head, HeadForward
