"""Kernels for test_offline.py: small ones that are right, each beside one with a planted fault; and launches to compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_one(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < size) + 1, mask=offsets < size)


@triton.jit
def add_integers(x_ptr, y_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(y_ptr))


@triton.jit
def sub_integers(x_ptr, y_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) - tl.load(y_ptr))


@triton.jit
def mul_integers(x_ptr, y_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) * tl.load(y_ptr))


@triton.jit
def reads_past_the_end(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets <= size) + 1, mask=offsets < size)


@triton.jit
def reads_one_of_two(x_ptr, y_ptr, z_ptr, size, BLOCK: tl.constexpr, PAST: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.where(tl.program_id(0) % 2 == 0, x_ptr, y_ptr)
    tl.store(z_ptr + offsets, tl.load(source + offsets, mask=offsets < size + PAST), mask=offsets < size)


@triton.jit
def sums_by_atomics(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + offsets), 0))


@triton.jit
def sums_without_atomics(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.load(y_ptr) + tl.sum(tl.load(x_ptr + offsets), 0))


@triton.jit
def writes_overlapping_tiles(x_ptr, y_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * (BLOCK - 1) + lanes, tl.load(x_ptr + tl.program_id(0) * BLOCK + lanes))


@triton.jit
def shifts_in_place(x_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets + 1, mask=offsets + 1 < size, other=0.0))


@triton.jit
def last_program_sums(
    x_ptr, partial_ptr, ticket_ptr, y_ptr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, ORDER: tl.constexpr, BARRIER: tl.constexpr
):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    tl.store(partial_ptr + program * BLOCK + lanes, tl.load(x_ptr + program * BLOCK + lanes))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem=ORDER) == PROGRAMS - 1:
        rows = tl.arange(0, PROGRAMS)
        tl.store(y_ptr, tl.sum(tl.sum(tl.load(partial_ptr + rows[:, None] * BLOCK + lanes[None, :]), 1), 0))
        tl.store(ticket_ptr, 0)


@triton.jit
def last_of_each_group_sums(x_ptr, partial_ptr, ticket_ptr, y_ptr, programs, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    group = program // GROUP
    tl.store(partial_ptr + program * BLOCK + lanes, tl.load(x_ptr + program * BLOCK + lanes))
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr + group, 1, sem="acq_rel") == tl.minimum(GROUP, programs - group * GROUP) - 1:
        rows = group * GROUP + tl.arange(0, GROUP)
        values = tl.load(partial_ptr + rows[:, None] * BLOCK + lanes[None, :], mask=rows[:, None] < programs, other=0.0)
        tl.store(y_ptr + group, tl.sum(tl.sum(values, 1), 0))


@triton.jit
def reverses_through_memory(x_ptr, scratch_ptr, y_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    base = tl.program_id(0) * BLOCK
    tl.store(scratch_ptr + base + lanes, tl.load(x_ptr + base + lanes))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + base + lanes, tl.load(scratch_ptr + base + BLOCK - 1 - lanes))


@triton.jit
def stores_pairs_of_lanes(y_ptr, BLOCK: tl.constexpr, SAME: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    values = lanes // 2 if SAME else lanes
    tl.store(y_ptr + lanes // 2, values.to(tl.float32))


@triton.jit
def matrix_vector(x_ptr, w_ptr, y_ptr, rows, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    total = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in tl.range(0, COLUMNS, BLOCK, num_stages=1):
        column = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + row[:, None] * COLUMNS + column[None, :], mask=row[:, None] < rows, eviction_policy="evict_first")
        total += w.to(tl.float32) * tl.load(x_ptr + column)[None, :].to(tl.float32)
    tl.store(y_ptr + row, tl.sum(total, 1).to(tl.bfloat16), mask=row < rows)


@triton.jit
def column_sums(w_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Neighbouring lanes are a row apart: every load is two bytes wide."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(0)
    w = tl.load(w_ptr + row * COLUMNS + column, eviction_policy="evict_first").to(tl.float32)
    tl.store(y_ptr + column, tl.sum(w, 0).to(tl.bfloat16))


@triton.jit
def subtract_mean(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x - tl.sum(x, 0) / SIZE)


@triton.jit
def product(a_ptr, b_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(y_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def arithmetic(x_ptr, y_ptr, sum_ptr, difference_ptr, product_ptr, larger_ptr, fused_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(sum_ptr + offsets, x + y)
    tl.store(difference_ptr + offsets, x - y)
    tl.store(product_ptr + offsets, x * y)
    tl.store(larger_ptr + offsets, tl.maximum(x, y))
    tl.store(fused_ptr + offsets, tl.fma(x, y, x))


@triton.jit
def reduce(x_ptr, y_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(y_ptr, tl.sum(x, 0))
    tl.store(y_ptr + 1, tl.max(x, 0))


@triton.jit
def cast(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


# nibbles 0 and 4 of a word as bfloat16: 128 + q by one lop3, then minus 128
NIBBLES = tl.constexpr("""{
    .reg .b32 pair, one;
    lop3.b32 pair, $2, 0x000F000F, 0x43004300, 0xEA;
    mov.b32 one, 0x3F803F80;
    fma.rn.bf16x2 pair, pair, one, $3;
    mov.b32 {$0, $1}, pair;
}""")


@triton.jit
def decode_nibbles(word_ptr, low_ptr, high_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    word = tl.load(word_ptr + offsets)
    bias = tl.full(word.shape, -0x3CFF3D00, tl.int32)
    low, high = tl.inline_asm_elementwise(NIBBLES, "=h,=h,r,r", [word, bias], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1)
    tl.store(low_ptr + offsets, low)
    tl.store(high_ptr + offsets, high)


@triton.jit
def dot_of_bytes(a_ptr, b_ptr, c_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    operands = [tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), tl.load(c_ptr + offsets)]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1];", "=r,l", [a_ptr], dtype=tl.int32, is_pure=False, pack=1)
    y = tl.inline_asm_elementwise("dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", operands, dtype=tl.int32, is_pure=True, pack=1)
    tl.store(y_ptr + offsets, y)


def run_matrix_vector(x: Tensor, w: Tensor, block: int = 256) -> Tensor:
    y = torch.empty(w.shape[0], dtype=x.dtype)
    matrix_vector[(triton.cdiv(w.shape[0], 4),)](x, w, y, w.shape[0], COLUMNS=w.shape[1], BLOCK_ROWS=4, BLOCK=block, num_warps=1)
    return y


def sample_launches() -> None:
    """What the compile tests look at, in this order."""
    bf16 = torch.bfloat16
    run_matrix_vector(torch.empty(2048, dtype=bf16), torch.empty(1024, 2048, dtype=bf16))
    column_sums[(64,)](torch.empty(1024, 64, dtype=bf16), torch.empty(64, dtype=bf16), ROWS=1024, COLUMNS=64)
    subtract_mean[(1,)](torch.empty(16384), torch.empty(16384), SIZE=16384, num_warps=1)
    product[(1,)](torch.empty(32, 64, dtype=bf16), torch.empty(64, 32, dtype=bf16), torch.empty(32, 32), M=32, N=32, K=64)
    run_matrix_vector(torch.empty(2048, dtype=bf16), torch.empty(1024, 2048, dtype=bf16))
    add_one_op(torch.empty(1000))


@torch.library.custom_op("offline_test::add_one", mutates_args=())
def add_one_op(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    add_one[(triton.cdiv(x.numel(), 128),)](x, y, x.numel(), BLOCK=128)
    return y


def too_much_shared_memory() -> None:
    a, b = torch.empty(128, 256, dtype=torch.bfloat16), torch.empty(256, 128, dtype=torch.bfloat16)
    product[(1,)](a, b, torch.empty(128, 128), M=128, N=128, K=256, num_warps=8)


def sample_step(preset: str, quantization: str, batch: int, context: int, layers: int, arch: int) -> Callable[[], None]:
    """A "decode step" like the model's: something before the layers, two launches in each, something after them."""
    rows = 1000  # the last program of a matrix has fewer rows
    square = [torch.zeros(rows, 1024, dtype=torch.bfloat16) for _ in range(layers)]

    def run() -> None:
        x, y = torch.zeros(1024, dtype=torch.bfloat16), torch.empty(1024, dtype=torch.bfloat16)
        add_one[(4,)](x, y, 1024, BLOCK=256)
        for w in square:
            run_matrix_vector(y, w)
            add_one[(8,)](x, y, 1024, BLOCK=128)
        partial, ticket, total = torch.empty(16, 64), torch.zeros(1, dtype=torch.int32), torch.empty(1)
        last_program_sums[(16,)](torch.zeros(16, 64), partial, ticket, total, BLOCK=64, PROGRAMS=16, ORDER="acq_rel", BARRIER=True)

    return run
