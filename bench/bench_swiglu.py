"""swiglu: silu(gate) * up, two values read and one written."""

from __future__ import annotations

from collections.abc import Callable

from granite_kernels.bench.harness import Case, Inputs
from granite_kernels.bench.rivals import liger
from granite_kernels.bench.shapes import Setting, rows_cost


def cases(setting: Setting) -> list[Case]:
    inner = setting.config.intermediate_size

    def halves(inputs: Inputs) -> Inputs:
        gate, up = inputs.args[0].chunk(2, dim=-1)
        return Inputs((gate.contiguous(), up.contiguous()))

    return [
        Case(
            op="swiglu",
            file="swiglu",
            size=f"{inner}",
            setting=setting,
            inputs=Inputs((setting.normal(*setting.shape, 2 * inner),)),
            cost=rows_cost(setting, inner, 3, flops=5),
            rivals=(liger("liger_swiglu", halves),),
        )
    ]


def test_swiglu(measured: Callable[[], None]) -> None:
    measured()
