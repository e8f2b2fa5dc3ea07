"""What a captured launch costs: registers, spills, occupancy, load widths, and the instructions that a whole launch issues.

`measure(launch)` reads the compiled code. How often loops run isn't in the code; it follows from bytes: a thread must load
its share of what is streamed (loads marked evict_first, `.EF` in the code), the code outside the loop loads some of it,
one trip of the loop a known amount, and the rest are trips. So unrolling by the compiler can't deceive the count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import sass
from .capture import Launch
from .cards import ARCHITECTURES
from .lines import weigher


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Counts of one compiled launch. Bytes "in flight" are those of one program, before it stalls on the first of them."""

    name: str
    arch: int
    grid: tuple[int, int, int]
    constexprs: dict[str, str]
    num_warps: int
    num_stages: int
    registers: int
    spills: int  # loads and stores of local memory in the code
    spill_bytes: int  # stack and local memory of a thread
    shared: int
    blocks_per_sm: int
    occupancy: float
    limited_by: str
    instructions: int
    loop_instructions: int
    load_widths: dict[int, int]  # bits a lane -> number of global loads in the code
    streamed_widths: dict[int, int]  # of loads marked evict_first
    loop_widths: dict[int, int]
    async_copies: int
    tma_loads: int
    tensor_core: dict[str, int]
    barriers: int
    grid_dependency: int  # waits and triggers of programmatic dependent launch
    in_flight: int
    streamed_in_flight: int
    tensor_bytes: int  # size of all tensor arguments
    dynamic_instructions: int | None = None  # warp instructions of the whole launch
    instructions_per_byte: float | None = None
    trips: float | None = None
    hash: str = ""
    site: str = ""
    new: bool = True
    pdl: bool = False

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def in_flight_per_sm(self, sms: int, streamed: bool = False) -> int:
        """Bytes in flight on one SM, with the programs that fit and that the grid has for it."""
        resident = min(self.blocks_per_sm, -(-self.programs // sms))
        return resident * (self.streamed_in_flight if streamed else self.in_flight)


def occupancy(registers: int, shared: int, warps: int, arch: int) -> tuple[int, float, str]:
    """Programs resident on one SM, the share of its warps that they are, and what limits them."""
    limits = ARCHITECTURES[arch]
    warp_registers = -(-max(registers, 1) * 32 // 256) * 256  # allocated by 256
    block_shared = -(-(shared + 1024) // 128) * 128  # 1 KiB belongs to the system, allocated by 128
    fits = {
        "warps": limits.warps_per_sm // warps,
        "blocks": limits.blocks_per_sm,
        "registers": limits.registers_per_sm // warp_registers // warps,
        "shared": limits.shared_per_sm // block_shared,
    }
    limited_by = min(fits, key=lambda name: fits[name])
    return fits[limited_by], fits[limited_by] * warps / limits.warps_per_sm, limited_by


def dynamic_instructions(
    code: sass.Code, lane_bytes: float, weight: Callable[[sass.Instruction], float] = lambda instruction: 1.0
) -> tuple[float, float | None]:
    """Warp instructions of an average warp whose threads load `lane_bytes` each of streamed data, and the trips of the hot loop.

    `weight`: how many of the warps run an instruction, as a share. Loops without streamed loads count once. Where several innermost
    loops stream (a remainder after an unrolled loop), the longest runs as often as it can and the others do the rest.
    """
    streamed = any(instruction.is_streamed for instruction in code.instructions)
    loops = [loop for loop in code.innermost if sass.load_bytes(code.body(loop), streamed)]
    loops.sort(key=lambda loop: sass.load_bytes(code.body(loop), streamed), reverse=True)
    if not loops:
        return float(sum(map(weight, code.instructions))), None
    inside = {position for loop in loops for position in range(loop.first, loop.last + 1)}
    instructions = sum(weight(instruction) for position, instruction in enumerate(code.instructions) if position not in inside)
    outside = [instruction for position, instruction in enumerate(code.instructions) if position not in inside]
    if any(sass.async_bytes(code.body(loop)) for loop in loops):
        # the copies before a pipelined loop are its first trips' own: the loop still runs for them, its last copies masked
        outside = [instruction for instruction in outside if instruction.stem != "LDGSTS"]
    remaining = lane_bytes - sass.load_bytes(outside, streamed)
    hot_trips = None
    for position, loop in enumerate(loops):
        one_trip = sass.load_bytes(code.body(loop), streamed)
        trips = max(0.0, remaining / one_trip)
        if position < len(loops) - 1:
            trips = float(int(trips + 1e-6))
        remaining -= trips * one_trip
        instructions += trips * sum(map(weight, code.body(loop)))
        hot_trips = trips if hot_trips is None else hot_trips
    return instructions, hot_trips


def measure(
    launch: Launch,
    streamed: Sequence[str] = (),
    streamed_bytes: int | None = None,
    dram_bytes: int | None = None,
    shares: Iterable[tuple[str, int, float]] = (),
) -> Metrics:
    """Metrics of a captured launch.

    The dynamic counts need the bytes that the launch streams: `streamed_bytes` (a trace knows it), or the names of the
    arguments that it reads exactly once by loads marked evict_first (`streamed=("planes.0",)`), whose sizes are taken: name
    all that are marked so and no others, or, where no load is marked, all that are read. `trips` that isn't a whole number
    says that the bytes don't fit the code. `dram_bytes` is what the
    instructions are divided by, by default the size of all tensor arguments. `shares` (see `lines`): of the programs that run a
    line; without them all code counts for every program, that of the last at a ticket included.
    """
    code = sass.disassemble(launch.cubin)
    hot = code.hot_loop
    body = code.body(hot) if hot else ()
    blocks, share, limited_by = occupancy(launch.registers, launch.shared, launch.num_warps, launch.arch)
    threads = launch.num_warps * sass.LANES
    stages = max(launch.num_stages - 1, 1)
    async_flight = stages * sass.async_bytes(body)

    def flight(marked: bool) -> int:
        whole, loop = sass.pending_bytes(code.instructions, marked), sass.pending_bytes(body, marked)
        return (max(whole, loop) + async_flight) * threads

    size = launch.bytes_of()
    if streamed_bytes is None and streamed:
        streamed_bytes = launch.bytes_of(*streamed)
    dynamic = per_byte = trips = None
    if streamed_bytes is not None and launch.programs:
        one_warp, trips = dynamic_instructions(code, streamed_bytes / (launch.programs * threads), weigher(shares))
        dynamic = round(one_warp * launch.num_warps * launch.programs)
        per_byte = dynamic / (dram_bytes or size)
    return Metrics(
        name=launch.name,
        arch=launch.arch,
        grid=launch.grid,
        constexprs={name: str(getattr(value, "__name__", value)) for name, value in launch.constexprs.items()},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=launch.registers,
        spills=sass.count(code.instructions, *sass.SPILLS),
        spill_bytes=launch.spill_bytes,
        shared=launch.shared,
        blocks_per_sm=blocks,
        occupancy=share,
        limited_by=limited_by,
        instructions=len(code.instructions),
        loop_instructions=len(body),
        load_widths=dict(sass.load_widths(code.instructions)),
        streamed_widths=dict(sass.load_widths(code.instructions, streamed=True)),
        loop_widths=dict(sass.load_widths(body)),
        async_copies=sass.count(code.instructions, "LDGSTS"),
        tma_loads=sass.count(code.instructions, "UTMALDG"),
        tensor_core=dict(sass.tensor_core(code.instructions)),
        barriers=sass.count(code.instructions, "BAR", "SYNCS", "WARPSYNC"),
        grid_dependency=sass.count(code.instructions, "ACQBULK", "PREEXIT"),
        in_flight=flight(False),
        streamed_in_flight=flight(True),
        tensor_bytes=size,
        dynamic_instructions=dynamic,
        instructions_per_byte=per_byte,
        trips=trips,
        hash=launch.hash,
        site=launch.site,
        new=launch.new,
        pdl=launch.pdl,
    )


def to_json(metrics: Metrics) -> dict[str, Any]:
    return dataclasses.asdict(metrics)


def from_json(record: dict[str, Any]) -> Metrics:
    """The inverse of `to_json` after a trip through JSON, which turns integer keys and tuples into texts and lists."""
    widths = {
        name: {int(bits): number for bits, number in record[name].items()} for name in ("load_widths", "streamed_widths", "loop_widths")
    }
    return Metrics(**{**record, **widths, "grid": tuple(record["grid"])})
