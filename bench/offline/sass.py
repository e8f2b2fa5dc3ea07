"""Machine code read back: instructions, loops, widths of loads, tensor-core instructions, loads in flight.

Everything here is exact for the code it reads (a cubin, by the nvdisasm of the Triton wheel). The unit is the warp
instruction; a lane's bytes are those of one thread.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .capture import TOOLS

LANES = 32
TENSOR_CORE = ("HMMA", "IMMA", "QMMA", "OMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "BGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")
SPILLS = ("LDL", "STL")
WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}

_LABEL = re.compile(r"^\s*(\.L_x?_?\w+):")
_LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    operation: str  # with its modifiers, as "LDG.E.EF.128"
    arguments: str
    lines: tuple[tuple[str, int], ...]  # file name and line, then those that it was inlined at

    @property
    def line(self) -> tuple[str, int] | None:
        """File name and line of the innermost inlined function."""
        return self.lines[0] if self.lines else None

    @property
    def stem(self) -> str:
        return self.operation.split(".")[0]

    @property
    def is_global_load(self) -> bool:
        return self.stem in ("LDG", "LDGSTS")

    @property
    def is_streamed(self) -> bool:
        """A load with eviction policy evict_first: the project marks weights and cache so."""
        return self.is_global_load and ".EF" in self.operation

    @property
    def lane_bytes(self) -> int:
        """Bytes that one thread moves (for loads and stores)."""
        return next((size for suffix, size in WIDTHS.items() if suffix in self.operation), 4)


@dataclasses.dataclass(frozen=True)
class Loop:
    """Instructions first to last (inclusive), by position in the code."""

    first: int
    last: int

    def contains(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


@dataclasses.dataclass(frozen=True)
class Code:
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]  # short ones first

    @property
    def innermost(self) -> list[Loop]:
        return [loop for loop in self.loops if not any(loop.contains(other) for other in self.loops)]

    def body(self, loop: Loop) -> tuple[Instruction, ...]:
        return self.instructions[loop.first : loop.last + 1]

    @property
    def hot_loop(self) -> Loop | None:
        """The innermost loop that loads most, tensor-core work counted like loads; None for straight code."""
        return max(self.innermost, key=lambda loop: _weight(self.body(loop)), default=None)


@functools.lru_cache(64)  # launches of one kernel differ in their sizes alone, and nvdisasm takes half a second
def disassemble(cubin: bytes) -> Code:
    """The kernel's code up to its last EXIT. Raises CalledProcessError where nvdisasm refuses the code object."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "-c", "-g", file.name]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not result.stdout:  # without line information
            result = subprocess.run([command[0], "-c", file.name], capture_output=True, text=True, check=True)
    return parse(result.stdout)


def parse(text: str) -> Code:
    """nvdisasm's text -> instructions and loops. A loop is a branch to an earlier label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    lines: tuple[tuple[str, int], ...] = ()
    in_chain = False  # lines of an inlined call follow each other, innermost first
    for row in text.splitlines():
        if found := _LABEL.match(row):
            waiting.append(found[1])
        elif found := _LINE.match(row):
            lines = (*(lines if in_chain else ()), (Path(found[1]).name, int(found[2])))
            in_chain = True
        elif found := _CODE.match(row):
            in_chain = False
            labels.update(dict.fromkeys(waiting, int(found[1], 16)))
            waiting = []
            instructions.append(Instruction(int(found[1], 16), found[3], found[4], lines))
    exits = [position for position, instruction in enumerate(instructions) if instruction.stem == "EXIT"]
    loops = _loops(instructions, labels)
    end = max([*exits, *(loop.last for loop in loops)], default=-1) + 1  # what follows is padding
    return Code(tuple(instructions[:end]), loops)


def _loops(instructions: Sequence[Instruction], labels: dict[str, int]) -> tuple[Loop, ...]:
    position = {instruction.address: index for index, instruction in enumerate(instructions)}
    loops = set()
    for index, instruction in enumerate(instructions):
        target = re.search(r"(\.L_\w+)", instruction.arguments) if instruction.stem == "BRA" else None
        address = labels.get(target[1]) if target else None
        if address is not None and address < instruction.address:  # a branch to itself is the trap after the code
            loops.add(Loop(position[address], index))
    return tuple(sorted(loops, key=lambda loop: loop.last - loop.first))


def _weight(body: Iterable[Instruction]) -> int:
    weight = 0
    for instruction in body:
        if instruction.is_global_load:
            weight += instruction.lane_bytes
        elif instruction.stem.startswith("UTMALDG"):
            weight += 512  # one instruction moves a tile
        elif instruction.stem in TENSOR_CORE:
            weight += 16
    return weight


def count(body: Iterable[Instruction], *stems: str) -> int:
    return sum(instruction.stem in stems for instruction in body)


def load_widths(body: Iterable[Instruction], streamed: bool = False) -> Counter[int]:
    """Global loads by width in bits a lane; with `streamed` only those marked evict_first."""
    return Counter(8 * i.lane_bytes for i in body if (i.is_streamed if streamed else i.is_global_load))


def load_bytes(body: Iterable[Instruction], streamed: bool = False) -> int:
    """Bytes a lane that one pass over these instructions loads."""
    return sum(width // 8 * number for width, number in load_widths(body, streamed).items())


def tensor_core(body: Iterable[Instruction]) -> Counter[str]:
    """Tensor-core instructions with their modifiers, as `HMMA.16816.F32.BF16`."""
    return Counter(i.operation for i in body if i.stem in TENSOR_CORE)


def pending_bytes(body: Sequence[Instruction], streamed: bool = False) -> int:
    """Most bytes a lane of loads to registers that are under way before an instruction needs one of them.

    The body is walked twice, so that loads issued for the next trip of a loop count.
    """
    pending: dict[int, int] = {}  # first register -> bytes
    most = 0
    for instruction in (*body, *body):
        operands = [operand.strip() for operand in instruction.arguments.split(",")]
        writes_first = not instruction.stem.startswith(("ST", "RED", "BRA"))
        read = {int(number) for operand in operands[writes_first:] for number in re.findall(r"\bR(\d+)", operand)}
        for register in [
            register for register, size in pending.items() if any(register <= used < register + max(1, size // 4) for used in read)
        ]:
            del pending[register]
        target = re.match(r"R(\d+)", operands[0])
        if instruction.stem == "LDG" and target and (instruction.is_streamed or not streamed):
            pending[int(target[1])] = instruction.lane_bytes
            most = max(most, sum(pending.values()))
    return most


def async_bytes(body: Iterable[Instruction]) -> int:
    """Bytes a lane that one pass copies to shared memory without waiting (cp.async)."""
    return sum(i.lane_bytes for i in body if i.stem == "LDGSTS")
