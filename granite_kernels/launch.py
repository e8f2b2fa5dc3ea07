"""Block sizes and warps as plain functions of shape, format and architecture. No autotuning: the same sizes give the same bits.

Every table names the GPU and the date it was tuned on; "compiled" means chosen from compiled code (registers, loads, instructions
a byte), not yet measured on a card.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

DECODE_TOKENS = 16  # tokens a step, over the whole batch, that the decode kernels take


@dataclasses.dataclass(frozen=True)
class Target:
    """What a launch is shaped for: compute capability (90 for 9.0) and streaming multiprocessors."""

    arch: int
    sms: int


INTERPRETED = Target(arch=90, sms=132)  # on the CPU: the sizes that an H100 would get


def target(tensor: Tensor) -> Target:
    """The target of the device that holds `tensor`."""
    if not tensor.is_cuda:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return Target(major * 10 + minor, torch.cuda.get_device_properties(tensor.device).multi_processor_count)


# ------------------------------------------------------------------ matrices at 1 to 16 tokens


@dataclasses.dataclass(frozen=True)
class MatrixLaunch:
    """Shape of a skinny product: a program owns 16 * groups rows, `warps` and `splits` programs share k, `unroll` steps at a time."""

    groups: int
    warps: int
    splits: int
    unroll: int
    tokens: int  # 8 or 16: columns of the tensor-core product

    def blocks(self, rows: int, half: int) -> int:
        pairs = -(-rows // (2 * half)) * half
        return -(-pairs // (8 * self.groups))

    def workspace(self, rows: int, half: int) -> tuple[int, int]:
        """(tickets, partial sums) that the launch needs."""
        blocks = self.blocks(rows, half)
        return (blocks, blocks * self.splits * 16 * self.groups * self.tokens) if self.splits > 1 else (0, 0)


def matrix_launch(rows: int, columns: int, tokens: int, target: Target) -> MatrixLaunch:
    """Compiled, 2026-11 (no card yet). A few tokens: 16 rows a program, and two programs along k where the matrix is too small to
    fill the GPU otherwise. More: 64 rows, so that the programs together read x no more than a quarter as often as the weight, and
    up to four along k, so that there still are programs for every multiprocessor.
    """
    wide = 8 if tokens <= 8 else 16
    groups = 1 if wide == 8 else 4
    units = max(columns // 32, 1)
    blocks = -(-rows // (16 * groups))
    splits = next((n for n in (1, 2, 4) if blocks * n >= 3 * target.sms // 2 or units % (8 * n)), 4)
    while splits > 1 and units % (4 * splits):
        splits //= 2
    warps = next((n for n in (8, 4, 2) if units % (n * splits) == 0 and units >= n * splits * 4 and (n < 8 or blocks * splits < 4 * target.sms)), 1)
    per_warp = units // (warps * splits)
    unroll = next((n for n in (4, 2) if per_warp % n == 0 and groups == 1), 1)
    return MatrixLaunch(groups, warps, splits, unroll, wide)


# ------------------------------------------------------------------ attention


@dataclasses.dataclass(frozen=True)
class AttentionLaunch:
    """Shape of an attention program: block_m rows (tokens x heads of a group) against tiles of block_n slots."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def roomy(target: Target) -> bool:
    """Whether a program may take more than 99 KiB of shared memory: the data-centre parts."""
    return target.arch in (80, 90, 100, 103)


def attention_launch(rows: int, head_dim: int, dtype: torch.dtype, target: Target) -> AttentionLaunch:
    """Prefill. Compiled, 2026-11 (no card yet). block_n does not depend on the rows, so that a prompt read in pieces gives the
    same sums as one read whole.
    """
    if dtype == torch.float32:
        return AttentionLaunch(16 if rows <= 16 else 32, 32, 4, 1)  # products on the plain units: registers are the limit
    block_m = 64 if rows <= 64 else 128
    wide = head_dim > 64
    if target.arch in (90, 100, 103):
        return AttentionLaunch(block_m, 128 if not wide else 64, block_m // 16, 3)
    return AttentionLaunch(block_m, 32 if wide else 64, block_m // 16, 3 if roomy(target) else 2)


@dataclasses.dataclass(frozen=True)
class AttentionDecodeLaunch:
    """Shape of decode attention: a sequence's cache is shared by up to `splits` programs a kv head, each on whole tiles of block_n."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int


def attention_decode_launch(rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, target: Target) -> AttentionDecodeLaunch:
    """Compiled, 2026-11 (no card yet). Two programs a multiprocessor for one sequence, at any context and any batch: the split
    must not depend on the batch, since the order of the sums does on the split.
    """
    splits = max(2 * target.sms // kv_heads, 1)
    block_m = min(max(16, 1 << (rows - 1).bit_length()), 64)
    if dtype == torch.float32:
        return AttentionDecodeLaunch(min(block_m, 32), 32, splits, 4, 1)
    warps = 2 if head_dim <= 64 and block_m == 16 else 4  # few, since each repeats the addresses and the softmax's bookkeeping
    return AttentionDecodeLaunch(block_m, 64, splits, warps, 3 if head_dim <= 64 or roomy(target) else 2)


# ------------------------------------------------------------------ rows


@dataclasses.dataclass(frozen=True)
class RowLaunch:
    """Shape of a row-wise launch: a program owns `rows` rows of `width` (a power of two) columns."""

    rows: int
    width: int
    warps: int

    def programs(self, rows: int) -> int:
        return -(-rows // self.rows)


def row_launch(rows: int, width: int) -> RowLaunch:
    """Compiled, 2026-11. About 2,048 values a program, so that short rows share one; 16 to 32 values a thread."""
    padded = 1 << (width - 1).bit_length()
    return RowLaunch(max(1, min(2048 // padded, 8)), padded, min(16, max(4, padded // 1024)))
