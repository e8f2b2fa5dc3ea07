"""A step's chosen experts, each read once however many tokens chose it: the matrix body on one expert's rows at a time.

    inner[m, i] = silu(gate) * up,   gate | up = gate_up[e] @ x[m],          e = chosen[m, i]
    out[m] = residual[m] + scale * sum_i shares[m, i] * (down[e] @ inner[m, i])

A program has a slot and a block of rows. Slots are the experts or, where there are fewer of these, the choices (m, i); a slot whose
expert nobody chose, or an earlier choice has taken, leaves at once. What a program needs to know, who chose its expert, it reads from
`chosen` itself: no list is made before, and the host learns nothing. Column m of the product is token m: those that did not choose
the expert repeat one that did, so that their x costs no bytes, and are not stored. So no bit of a token depends on the others.

For `down` the products of each choice go to the workspace, float32 [tokens * TOP_K, hidden]; the programs of a row block meet at a
ticket, and the last one combines them in the order of the choices.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from granite_kernels.linear.body import product
from granite_kernels.linear.epilogue import pairs

NOBODY = tl.constexpr(2147483647)


def _cost(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Of the most experts that the tokens can choose: which they are is known to the device alone."""
    size, columns, tokens, rows = args["x_ptr"].element_size(), args["SHAPE"].columns, args["tokens"], args["rows"]
    choices, gated = tokens * args["TOP_K"], "swiglu" in kernel.name
    moved = tokens * columns + choices * rows // 2 if gated else choices * columns + 2 * tokens * rows
    weight = sum(plane.numel() * plane.element_size() for plane in args["planes"]) * args["slots"] // args["experts"]
    return {"name": kernel.name, "flops": 2 * choices * rows * columns, "bytes": weight + size * moved + 4 * choices * (1 if gated else 2)}


@triton.jit
def who_chose(
    chosen_ptr, slot, tokens,
    TOP_K: tl.constexpr, PLACES: tl.constexpr, TOKENS: tl.constexpr, ONE: tl.constexpr, BY_CHOICE: tl.constexpr,
):  # fmt: skip
    """A slot's (expert, choices int32 [TOKENS], the first of them): token m's choice of the expert is m * TOP_K + its place, NOBODY
    where it chose others. A slot by choice has work if it is the first.
    """
    expert = tl.load(chosen_ptr + slot) if BY_CHOICE else slot
    if ONE:
        return expert, tl.where(tl.arange(0, TOKENS) == 0, slot, NOBODY), slot
    else:
        token, place = tl.arange(0, TOKENS)[:, None], tl.arange(0, PLACES)[None, :]
        choice = token * TOP_K + place
        ids = tl.load(chosen_ptr + choice, mask=(token < tokens) & (place < TOP_K), other=-1)
        choices = tl.min(tl.where(ids == expert, choice, NOBODY), 1)
        return expert, choices, tl.min(choices, 0)


@triton.jit
def expert_product(
    x_ptr, planes, expert, choices, first, block, rows, half, TOP_K: tl.constexpr, OF_CHOICES: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """The product of an expert's row block with the rows of x [tokens or, OF_CHOICES, choices; columns], float32 [16 groups, TOKENS]."""
    order = tl.where(choices < NOBODY, choices, first)
    if not OF_CHOICES:
        order = order // TOP_K
    base = expert.to(tl.int64) * rows
    y, _ = product(x_ptr, x_ptr, planes, (rows,), order, block, 0, SHAPE.tokens, base, half, 0.0, 0, SHAPE)
    return y


@triton.jit(do_not_specialize=["tokens", "slots", "experts"], launch_metadata=_cost)
def _experts_gate_up_swiglu_kernel(
    x_ptr,  # [tokens, COLUMNS]
    planes,  # of [experts * rows, COLUMNS], an expert's rows gate | up
    chosen_ptr,  # int32 [tokens, TOP_K]
    out_ptr,  # [tokens, TOP_K, rows / 2]
    tokens,
    slots,
    experts,
    rows,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    SHAPE: tl.constexpr,
    PDL: tl.constexpr,
):
    GROUPS: tl.constexpr = SHAPE.groups
    TOKENS: tl.constexpr = SHAPE.tokens
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # after the wait: the next launch looks at `chosen` before its own
    block, slot = tl.program_id(0), tl.program_id(1)
    expert, choices, first = who_chose(chosen_ptr, slot, tokens, TOP_K, PLACES, TOKENS, SHAPE.one, BY_CHOICE)
    if first != slot if BY_CHOICE else first == NOBODY:
        return
    inner = rows // 2
    y = expert_product(x_ptr, planes, expert, choices, first, block, rows, None, TOP_K, False, SHAPE)
    gate, up = pairs(y, GROUPS, TOKENS)
    row = block * (8 * GROUPS) + tl.arange(0, 8 * GROUPS)[:, None]
    at = choices.to(tl.int64)[None, :] * inner + row
    inside = (choices < NOBODY)[None, :] & (row < inner)
    tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "slots", "experts"], launch_metadata=_cost)
def _experts_down_add_kernel(
    x_ptr,  # [tokens, TOP_K, COLUMNS]
    planes,  # of [experts * rows, COLUMNS]
    chosen_ptr,  # int32 [tokens, TOP_K]
    shares_ptr,  # float32 [tokens, TOP_K]
    residual_ptr,  # [tokens, rows]
    out_ptr,  # [tokens, rows]
    tickets_ptr,  # int32 [row blocks]
    partials_ptr,  # float32 [tokens, TOP_K, rows]
    tokens,
    slots,
    experts,
    rows,
    scale,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    SHAPE: tl.constexpr,
    PDL: tl.constexpr,
):
    GROUPS: tl.constexpr = SHAPE.groups
    TOKENS: tl.constexpr = SHAPE.tokens
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block, slot = tl.program_id(0), tl.program_id(1)
    expert, choices, first = who_chose(chosen_ptr, slot, tokens, TOP_K, PLACES, TOKENS, SHAPE.one, BY_CHOICE)
    if first == slot if BY_CHOICE else first < NOBODY:
        y = expert_product(x_ptr, planes, expert, choices, first, block, rows, 8, TOP_K, True, SHAPE)
        row = block * (16 * GROUPS) + tl.arange(0, 16 * GROUPS)[:, None]
        at = choices.to(tl.int64)[None, :] * rows + row
        tl.store(partials_ptr + at, y, mask=(choices < NOBODY)[None, :] & (row < rows))
    tl.debug_barrier()  # every thread's stores come before the ticket
    if tl.atomic_add(tickets_ptr + block, 1, sem="acq_rel") == slots - 1:
        tl.atomic_xchg(tickets_ptr + block, 0, sem="relaxed")  # so that the next launch, or a replayed graph, starts at zero
        row = block * (16 * GROUPS) + tl.arange(0, 16 * GROUPS)[None, :]
        token = tl.arange(0, TOKENS)[:, None]
        inside = (token < tokens) & (row < rows)
        y = tl.zeros((TOKENS, 16 * GROUPS), tl.float32)
        for place in tl.static_range(TOP_K):
            share = tl.load(shares_ptr + token * TOP_K + place, mask=token < tokens, other=0.0)
            at = (token * TOP_K + place).to(tl.int64) * rows + row
            y += share * tl.load(partials_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
        at = token.to(tl.int64) * rows + row
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (residual + scale * y).to(out_ptr.dtype.element_ty), mask=inside)
