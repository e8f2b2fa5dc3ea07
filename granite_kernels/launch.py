"""Block sizes and warps as plain functions of shape, format and architecture. No autotuning: the same sizes give the same bits.

Every table names the GPU and the date it was tuned on; "compiled" means chosen from compiled code (registers, loads, instructions
a byte), not yet measured on a card.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what kernels take; float64 is the reference's
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


def roomy(target: Target) -> bool:
    """Whether a program may take more than 99 KiB of shared memory: the data-centre parts."""
    return target.arch in (80, 90, 100, 103)


# ------------------------------------------------------------------ matrices at 1 to 16 tokens


EIGHT_BITS = ("q8_0", "int8", "fp8")  # formats of a byte a weight
SUPER_BLOCKS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")  # formats whose scales are themselves scaled by 256 columns


@dataclasses.dataclass(frozen=True)
class MatrixLaunch:
    """Shape of a skinny product: a program owns 16 * groups rows, `warps` and `splits` programs share k."""

    groups: int
    warps: int
    splits: int
    tokens: int  # 8 or 16: columns of the tensor-core product

    def blocks(self, rows: int, half: int) -> int:
        pairs = -(-rows // (2 * half)) * half
        return -(-pairs // (8 * self.groups))

    def workspace(self, blocks: int) -> tuple[int, int]:
        """(tickets, partial sums) that a launch of so many row blocks needs."""
        return (blocks, blocks * self.splits * (16 * self.groups + 1) * self.tokens) if self.splits > 1 else (0, 0)


@functools.cache  # asked for at every launch
def matrix_launch(rows: int, columns: int, tokens: int, target: Target, format: str = "dense") -> MatrixLaunch:
    """Compiled for sm_90, 2026-11 (no card yet): chosen for few instructions a byte and 24 KiB in flight a multiprocessor.

    More tokens want more rows a program, so that the programs together read x no more than a quarter as often as the weight; what
    that costs in programs comes back by sharing k between two or four. The order of the sums follows from the shape alone, so a
    row of a batch has the same bits in any batch of 2 to 8 tokens, and in any of 9 to 16.
    """
    if format != "dense":
        return _packed_launch(rows, columns, tokens, target, format)
    units = columns // 32
    if tokens == 1:
        groups, fill = (2 if rows >= 8192 else 1), 0.95
    elif tokens <= 8:
        groups, fill = (1 if rows * columns <= 1 << 22 else 2), 0.95  # a small matrix needs the programs
    elif rows * columns <= 1 << 22:
        groups, fill = 2, 0.7
    else:
        groups, fill = 4, (0.75 if columns >= 4096 else 0.7)
    blocks = -(-rows // (16 * groups))
    splits = next((n for n in (1, 2, 4) if blocks * n >= fill * target.sms), 4)
    while splits > 1 and units % (4 * splits):
        splits //= 2
    if columns >= 8192 or (tokens > 8 and groups == 2 and columns > 1024):
        wanted = 8
    else:
        wanted = 2 if tokens > 8 and columns <= 1024 else 4
    warps = next((n for n in (wanted, 4, 2) if units % (n * splits) == 0 and units >= 4 * n * splits), 4 if units >= 16 else 1)
    return MatrixLaunch(groups, warps, splits, 8 if tokens <= 8 else 16)


def _packed_launch(rows: int, columns: int, tokens: int, target: Target, format: str) -> MatrixLaunch:
    """A step is 128 columns, or a k-quant's 256. Instructions bind here before bytes do, so that warps are few and own many rows:
    each repeats the addresses, x and the scales' bookkeeping. Long rows have warps enough to keep loads in flight. Warps that share k
    within a program meet at less cost than programs do, so that three quarters of a card are enough before k is split.
    """
    steps = max(columns // (256 if format in SUPER_BLOCKS else 128), 1)
    # four groups' sums beside 16 tokens, or the words of two code planes, don't fit into the registers
    groups = 4 if tokens <= 8 and rows >= 8192 and format not in ("q3_k", "q5_k", "q6_k") else 2
    blocks = -(-rows // (16 * groups))
    few = format in ("q2_k", "q3_k") and columns < 4096  # bytes a row: still fewer programs and warps
    splits = next((n for n in (1, 2, 4) if blocks * n >= (0.45 if few else 0.7) * target.sms), 4)
    while splits > 1 and steps % splits:
        splits //= 2
    wanted = 4 if columns >= 4096 or (splits == 1 and blocks < target.sms and not few) else 2
    warps = next((n for n in (wanted, 2) if steps % (n * splits) == 0), 4 if steps >= 8 * splits else 1)
    return MatrixLaunch(groups, warps, splits, 8 if tokens <= 8 else 16)


def matrix_unroll(columns: int, shares: int, format: str) -> int:
    """Steps that a loop takes at a time where `shares` warps share k: of 32 columns, of 64 bytes, or of 128 codes."""
    if format in SUPER_BLOCKS:
        return 2
    if format not in ("dense", *EIGHT_BITS):
        return 1
    steps = columns // (32 if format == "dense" else 64)
    return next((n for n in (4, 2) if steps % (shares * n) == 0), 1)


# ------------------------------------------------------------------ packed rows to dense ones


@dataclasses.dataclass(frozen=True)
class DecodeLaunch:
    """Shape of a decoding launch: a program owns `rows` rows of `units` units of 32 columns, a unit a thread."""

    rows: int
    units: int
    warps: int


def decode_launch(*, gather: bool) -> DecodeLaunch:
    """Compiled, 2026-11 (no card yet). A gathered row is alone; else the eight rows whose metadata lie together."""
    return DecodeLaunch(1, 32, 1) if gather else DecodeLaunch(8, 16, 4)


# ------------------------------------------------------------------ packed matrices at 17 tokens and more


@dataclasses.dataclass(frozen=True)
class TiledLaunch:
    """Shape of a tiled product: a program owns block_m tokens x block_n rows and goes through `units` units of 32 columns at a time;
    `splits` programs share the columns.
    """

    block_m: int
    block_n: int
    units: int
    splits: int
    warps: int
    stages: int

    def tiles(self, rows: int, tokens: int) -> int:
        return -(-rows // self.block_n) * -(-tokens // self.block_m)

    def workspace(self, rows: int, tokens: int) -> tuple[int, int]:
        """(tickets, partial sums) that the launch needs."""
        tiles = self.tiles(rows, tokens)
        return (tiles, tiles * self.splits * self.block_m * self.block_n) if self.splits > 1 else (0, 0)


TILED_TOKENS = (64, 128, 256, 512, 1024)  # classes of tokens that tiled products are compiled for; more are decoded once (regimes.py)


def tiled_launch(rows: int, columns: int, tokens: int, target: Target) -> TiledLaunch:
    """Compiled, 2026-11 (no card yet). Two programs a multiprocessor, of which one decodes while the other multiplies; columns are
    shared, 256 and more a program, until three quarters of the multiprocessors have one. The same for all tokens of a class.
    """
    tokens = next(bound for bound in TILED_TOKENS if tokens <= bound)
    stages = 3 if roomy(target) else 2  # elsewhere two programs share 100 KiB
    many = tokens > 64 and -(-rows // 128) * -(-tokens // 128) >= target.sms
    units = next((n for n in ((4, 2, 1) if tokens <= 64 else (2, 1)) if columns % (32 * n) == 0), 1)
    shape = TiledLaunch(128 if tokens > 64 else 64, 128 if many else 64, units, 1, 8 if tokens > 64 else 4, stages)
    steps, splits = columns // (32 * units), 1
    while 4 * shape.tiles(rows, tokens) * splits < 3 * target.sms and steps % (2 * splits) == 0 and columns // (2 * splits) >= 256:
        splits *= 2
    return dataclasses.replace(shape, splits=splits)


# ------------------------------------------------------------------ experts


def experts_launch(columns: int, tokens: int, format: str) -> MatrixLaunch:
    """Of one expert's rows. Compiled, 2026-11 (no card yet). k is not shared: the experts fill the card between them."""
    step = 32 if format == "dense" else 64 if format in EIGHT_BITS else 256 if format in SUPER_BLOCKS else 128  # columns of a warp
    wanted = 2 if columns < 1024 and (tokens > 8 or format in EIGHT_BITS) else 4
    warps = next((n for n in (wanted, 2) if columns % (n * step) == 0), wanted if columns >= wanted * step else 1)
    groups = 2 if tokens > 8 or columns < 1024 or format != "dense" else 1  # enough bytes for what a program does beside the weights
    return MatrixLaunch(groups, warps, 1, 8 if tokens <= 8 else 16)


@dataclasses.dataclass(frozen=True)
class GroupedLaunch:
    """Shape of a grouped product: tiles of block_m choices of one expert, block_n of its rows and block_k columns."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


GROUPED_CHOICES = 64  # of one expert, on average, that the first shape takes


def grouped_launch(choices: int, experts: int, dtype: torch.dtype) -> GroupedLaunch:
    """Compiled, 2026-11 (no card yet). Two shapes: up to GROUPED_CHOICES an expert the weights' bytes are what counts."""
    if dtype == torch.float32:
        return GroupedLaunch(32, 32, 32, 4, 1)  # no tensor cores: registers limit
    if choices <= GROUPED_CHOICES * experts:
        return GroupedLaunch(64, 64, 64, 4, 3)
    return GroupedLaunch(128, 64, 64, 8, 3)


# ------------------------------------------------------------------ attention


@dataclasses.dataclass(frozen=True)
class AttentionLaunch:
    """Shape of an attention program: block_m rows (tokens x heads of a group) against tiles of block_n slots."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def attention_launch(head_dim: int, dtype: torch.dtype, target: Target) -> AttentionLaunch:
    """Prefill. Compiled, 2026-11 (no card yet). Whatever the tokens, so that a prompt read in pieces adds as one read whole."""
    wide = head_dim > 64
    if dtype == torch.float32:
        return AttentionLaunch(16, 16, 4, 1) if wide else AttentionLaunch(64, 32, 8, 1)  # no tensor cores: registers limit
    if target.arch in (90, 100, 103):
        return AttentionLaunch(128, 64 if wide else 128, 8, 3)
    return AttentionLaunch(128, 32 if wide else 64, 8, 3)


@dataclasses.dataclass(frozen=True)
class AttentionDecodeLaunch:
    """Shape of decode attention: blocks of block_m rows (tokens x heads of a group), and up to `splits` programs that take a
    sequence's tiles of block_n slots in turn, 1 << shift of them or more each.
    """

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int
    shift: int


@functools.cache
def attention_decode_launch(
    tokens: int, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, target: Target
) -> AttentionDecodeLaunch:
    """`tokens` of the whole batch, `rows` of a sequence's kv head. Compiled, 2026-11 (no card yet).

    Two or three programs a multiprocessor for one sequence, as its cache grows. The order of the sums follows from the split, so
    that this knows the batch only by the classes of the matrices, up to 8 tokens and more: those fill the card with fewer programs
    a sequence, and the sums that programs leave are 6 % of a single tile.
    """
    splits = max((3 if head_dim <= 64 else 2) * target.sms // kv_heads, 1)  # smaller tiles, more programs for the bytes in flight
    shift = 0 if tokens <= 8 else 2
    if dtype == torch.float32:
        return AttentionDecodeLaunch(8, 32, splits, 4, 1, shift)  # no tensor cores: registers limit
    # two warps, since each repeats the addresses and the softmax's bookkeeping; four would bring sm_100's instructions, which spill
    return AttentionDecodeLaunch(8 if rows <= 8 else 16, 64, splits, 2, 3 if target.arch in (100, 103) else 2, shift)


# ------------------------------------------------------------------ rows


@dataclasses.dataclass(frozen=True)
class RowLaunch:
    """Shape of a row-wise launch: a program owns `rows` rows of `width` (a power of two) columns."""

    rows: int
    width: int
    warps: int

    def programs(self, rows: int) -> int:
        return -(-rows // self.rows)


WIDEST_ROW = 16384  # columns that a program's registers hold


@functools.cache
def row_launch(rows: int, width: int) -> RowLaunch:
    """Compiled, 2026-11 (no card yet). About 2,048 values a program, so that short rows share one; 16 to 32 values a thread."""
    padded = 1 << (width - 1).bit_length()
    return RowLaunch(max(1, min(2048 // padded, 8)), padded, min(16, max(4, padded // 1024)))


@dataclasses.dataclass(frozen=True)
class RouteLaunch:
    """Shape of the router's launch: a program owns a token and reads `experts` (a power of two) by `block` values at a time."""

    experts: int
    block: int
    warps: int


def route_launch(experts: int, hidden: int) -> RouteLaunch:
    """Compiled, 2026-11 (no card yet). 16,384 values at a time, 32 a thread: one program has to keep its multiprocessor busy."""
    padded = 1 << (experts - 1).bit_length()
    block = max(min(16384 // padded, 1 << (hidden - 1).bit_length()), 16)
    return RouteLaunch(padded, block, max(4, min(16, padded * block // 1024)))
