"""Which lines of a kernel its programs run: what a branch hides from a count of its code.

Programs that meet at a ticket leave the last one to go on; what only that one runs is code of every program, but work of one among
many. In the interpreter a kernel's branches are Python's, so that Python's own tracing tells; the compiler's line information says
which instructions a line became.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from .sass import Instruction

Line = tuple[str, int]  # file name, number
HERE = str(Path(__file__).parent)
PACKAGE = __package__.split(".")[0]


class Lines:
    """How many of a launch's programs ran each line of this package's kernels, between `start` and `stop`; a line of a function that
    ran without it counts 0.
    """

    def __init__(self) -> None:
        self.programs = 0
        self.counts: Counter[Line] = Counter()
        self._codes: set[CodeType] = set()
        self._run: set[Line] = set()

    def start(self) -> None:
        sys.settrace(self._call)

    def stop(self) -> None:
        sys.settrace(None)
        self.program_ends()
        for code in self._codes:
            for _, _, line in code.co_lines():
                if line:
                    self.counts.setdefault((Path(code.co_filename).name, line), 0)

    def program_ends(self) -> None:
        if self._run:
            self.programs += 1
            self.counts.update(self._run)
            self._run = set()

    def shares(self) -> list[tuple[str, int, float]]:
        """File, line and the share of programs that ran it, where it isn't all."""
        return [(*line, count / self.programs) for line, count in sorted(self.counts.items()) if count < self.programs]

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if frame.f_globals.get("__name__", "").split(".")[0] != PACKAGE or code.co_filename.startswith(HERE):
            return None
        self._codes.add(code)
        name = Path(code.co_filename).name

        def line(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
            self._run.add((name, frame.f_lineno))
            return line

        return line(frame, event, argument)


def weigher(shares: Iterable[tuple[str, int, float]]) -> Callable[[Instruction], float]:
    """How many of a launch's warps run an instruction, as a share: that of the rarest line among those it was inlined through."""
    known = {(file, line): share for file, line, share in shares}

    def weight(instruction: Instruction) -> float:
        return min((known.get(line, 1.0) for line in instruction.lines), default=1.0)

    return weight
