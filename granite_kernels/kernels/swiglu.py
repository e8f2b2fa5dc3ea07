"""SwiGLU: y = silu(gate) * up, in float32, rounded once.

gate_up [rows, 2 * inner] -> [rows, inner]: two values are read for each one written, 6 bytes in 16 bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.launch import DTYPES
from granite_kernels.operation import operation

BLOCK = 1024


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    values = args["rows"] * args["inner"]
    return {"name": kernel.name, "flops": 5 * values, "bytes": 3 * values * args["gate_up_ptr"].element_size()}


@triton.jit(do_not_specialize=["rows"], launch_metadata=_cost)
def _swiglu_kernel(
    gate_up_ptr,  # [rows, 2 * inner], the gate first
    out_ptr,  # [rows, inner]
    rows,
    inner,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_up_ptr + row * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * inner + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@operation("granite_kernels::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    _swiglu_kernel[(rows, triton.cdiv(inner, BLOCK))](gate_up, out, rows, inner, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)
    return out


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * inner], the gate first. Returns [..., inner]. Raises GraniteError."""
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise GraniteError(f"gate_up has shape {tuple(gate_up.shape)}: an even number of columns is needed, gate and up")
    if gate_up.dtype not in DTYPES:
        raise GraniteError(f"gate_up is {gate_up.dtype}: expected float32, bfloat16 or float16")
    out: Tensor = _swiglu(gate_up.reshape(-1, gate_up.shape[-1]).contiguous())
    return out.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
