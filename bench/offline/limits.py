"""What a decode step is held to, told from its report: shared work is done once, nothing spills, loads are wide.

all architectures   no spills, shared memory within the class, 128-bit loads of bfloat16 weights and of the cache; every sector of
                    weights and cache goes to one program; everything else that goes to the multiprocessors at most 0.3 of the
                    weights' bytes; partial sums written at most 0.02 of all bytes; five launches a layer and three (dense models)
sm_90, bfloat16     matrices and attention at most 0.08 warp instructions a byte; in flight on a multiprocessor at least 24 KiB
                    or 0.8 of the launch's bytes for it, for the matrices
sm_90, packed       PACKED instructions a byte, by format, for one token and for more
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cards import ARCHITECTURES, cards_of

if TYPE_CHECKING:
    from .examine import Report
    from .roofline import Examined

INSTRUCTIONS = 0.08
PACKED = {"q8_0": (0.12, 0.18), "int8": (0.12, 0.18), "q5_k": (0.18, 0.28), "q6_k": (0.18, 0.28), "q4_k": (0.18, 0.28)}
PACKED |= {f"int4_g{size}{zero}": (0.18, 0.28) for size in (32, 64, 128) for zero in ("", "_zero")}
PACKED_ELSE = (0.25, 0.28)  # of one token, of 2 to 16
IN_FLIGHT = 24 << 10
REREAD, PARTIALS = 0.3, 0.02
SCRATCH = ("partials_ptr", "sums_ptr", "weights_ptr")


def broken(report: Report) -> list[str]:
    """One sentence a broken limit."""
    found = [f"{launch.traffic.name}: {fault}" for launch in report.launches for fault in _of_launch(launch, report)]
    weights = sum(launch.times * launch.traffic.streamed for launch in report.launches if not _is_attention(launch))
    reread = sum(launch.times * launch.traffic.reread for launch in report.launches)
    if reread > REREAD * weights:
        found.append(f"{reread / weights:.3f} of the weights' bytes are re-read, limit {REREAD}")
    partials = partial_sums(report)
    if partials > PARTIALS:
        found.append(f"partial sums are {partials:.2%} of the bytes, limit {PARTIALS:.0%}")
    if not any("experts" in launch.traffic.name for launch in report.launches) and report.count > 5 * report.layers + 3:
        found.append(f"{report.count} launches, limit 5 a layer and 3")
    return found


def partial_sums(report: Report) -> float:
    """Bytes that programs write for one another, as a share of all bytes of the step."""
    written = 0
    for launch in report.launches:
        scratch = [argument for argument in launch.traffic.arguments if set(argument.name.split("|")) & set(SCRATCH)]
        written += launch.times * sum(argument.written for argument in scratch)
    return written / max(report.bytes, 1)


def packed_limit(format: str, tokens: int) -> float:
    """Warp instructions a byte that a launch over weights of this format may take on sm_90."""
    return PACKED.get(format, PACKED_ELSE)[tokens > 1]


def _is_attention(launch: Examined) -> bool:
    return "attention" in launch.traffic.name


def _of_launch(launch: Examined, report: Report) -> list[str]:
    code, traffic, found = launch.metrics, launch.traffic, []
    if code.spills or code.spill_bytes:
        found.append(f"{code.spills} spills, {code.spill_bytes} bytes a thread")
    if code.shared > ARCHITECTURES[report.arch].shared_per_block:
        found.append(f"{code.shared} bytes of shared memory, there are {ARCHITECTURES[report.arch].shared_per_block}")
    if not traffic.streamed:
        return found
    dense = report.case.quantization == "none"
    if traffic.stream_readers != 1:
        found.append(f"a sector of weights or cache goes to {traffic.stream_readers} programs")
    widths = code.streamed_widths or code.loop_widths  # copies to shared memory don't show that they are streamed
    if (dense or _is_attention(launch)) and set(widths) != {128}:
        found.append(f"streamed by loads of {sorted(widths)} bits")
    if report.arch == 90:
        card = cards_of(90)[0]
        limit = INSTRUCTIONS if dense or _is_attention(launch) else packed_limit(report.case.quantization, report.case.batch)
        if launch.instructions_per_byte > limit:
            found.append(f"{launch.instructions_per_byte:.3f} instructions a byte, limit {limit:.3f}")
        need = min(IN_FLIGHT, 0.8 * traffic.streamed / card.sms)
        flight = code.in_flight_per_sm(card.sms)
        if dense and not _is_attention(launch) and flight < need:
            found.append(f"{flight / 1024:.1f} KiB in flight, limit {need / 1024:.1f}")
    return found
