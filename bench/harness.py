"""Verify, then time: one operation at one size, ours and its rivals, as rows.

Nothing is timed before its result has passed the accuracy rule of granite_kernels.testing against the reference in float64: a
wrong kernel is refused (a rival, where it is wrong beyond rounding). An absent rival and one that fails are rows, too, and stop
nobody else.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from granite_kernels.ops import WITH_WORKSPACE, why_not_triton
from granite_kernels.testing import Accuracy, accuracy
from granite_kernels.weight import DENSE, Part, Weight, dense_matrix
from granite_kernels.workspace import Workspace

from .roof import Roof, exact_float32
from .rows import ABSENT, ERROR, OK, REFUSED, Row
from .shapes import Cost, Setting
from .timing import Run, Timing, copies_of, time_on_cpu, time_on_gpu

RIVAL_SLACK = 16  # of others: their sums may have any order, but a figure of another computation is none
OURS, EAGER, COMPILED = "granite-kernels", "PyTorch eager", "torch.compile"


class AbsentError(Exception):
    """A rival isn't here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    args: tuple[Any, ...]
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.args if isinstance(value, Tensor | Weight))


@dataclasses.dataclass(frozen=True)
class Rival:
    """Another implementation. `build` returns what is called, or raises AbsentError; `adapt` lays the operation's inputs out for
    it, outside the timing; one that isn't `whole` does a part of the operation, and its result is not compared.
    """

    name: str
    build: Callable[[], Callable[..., Any]]
    adapt: Callable[[Inputs], Inputs] | None = None
    whole: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one size. `role` and `times`: what it is in a decode step, and how often.

    `results` takes what a call returned and its inputs and gives the tensors to compare, written caches among them; `reset`
    spoils beforehand what the call has to write.
    """

    op: str
    file: str
    size: str
    setting: Setting
    inputs: Inputs
    cost: Cost
    rivals: tuple[Rival, ...] = ()
    role: str = ""
    times: int = 0
    results: Callable[[Any, Inputs], list[Tensor]] = lambda result, inputs: [result] if isinstance(result, Tensor) else list(result)
    reset: Callable[[Inputs], None] = lambda inputs: None
    compiles: bool = True
    packs: bool = False  # whether the setting's format says how its matrix is stored

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"granite_kernels.reference.{self.file}"), self.op)

    def ours(self) -> Callable[..., Any]:
        """Triton's kernel; AbsentError where it can't run."""
        reason = why_not_triton(self.setting.device, self.setting.dtype)
        if reason is not None:
            raise AbsentError(f"needs a GPU: {reason}" if self.setting.device.type == "cpu" else reason)
        try:
            op = getattr(importlib.import_module(f"granite_kernels.kernels.{self.file}"), self.op)
        except (ImportError, AttributeError):
            raise AbsentError("there is no Triton kernel yet") from None
        if self.op in WITH_WORKSPACE:
            return functools.partial(op, workspace=Workspace.allocate(1 << 16, 1 << 24, self.setting.device))
        return op

    @property
    def implementations(self) -> tuple[Rival, ...]:
        """Ours, eager PyTorch, torch.compile of it, then the case's own rivals."""
        compiled = Rival(COMPILED, lambda: torch.compile(self.reference, dynamic=False))
        return (Rival(OURS, self.ours), Rival(EAGER, lambda: self.reference), *((compiled,) if self.compiles else ()), *self.rivals)

    def row(self, implementation: str, status: str, **figures: Any) -> Row:
        return {
            "kind": "kernel",
            "op": self.op,
            "size": self.size,
            "tokens": self.setting.tokens,
            "format": self.setting.format if self.packs else DENSE,
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "implementation": implementation,
            "status": status,
            "role": self.role,
            "times": self.times,
            **figures,
        }


# ------------------------------------------------------------------ inputs


def clone(inputs: Inputs, change: Callable[[Tensor], Tensor] = Tensor.clone) -> Inputs:
    """The inputs with every tensor, those of weights included, replaced by `change` of it."""

    def cloned(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Weight):
            return Weight(*(Part(part.format, tuple(change(plane.detach()) for plane in part.planes), part.shape) for part in value.parts))
        return value

    return Inputs(tuple(map(cloned, inputs.args)), {name: cloned(value) for name, value in inputs.keywords.items()})


def widen(inputs: Inputs) -> Inputs:
    """The inputs in float64, a weight by its values; integers stay, and so does what the operation takes in float32 by definition."""

    def wide(value: Any) -> Any:
        if isinstance(value, Weight):
            return Weight.dense(*(dense_matrix(part, torch.float64) for part in value.parts))
        if isinstance(value, torch.dtype):
            return torch.float64
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Inputs(tuple(map(wide, inputs.args)), {name: wide(value) for name, value in inputs.keywords.items()})


# ------------------------------------------------------------------ verify


def call(case: Case, run: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """The results of one call, copied: the next one may overwrite them."""
    case.reset(inputs)
    return [result.clone() for result in case.results(run(*inputs.args, **inputs.keywords), inputs)]


def verify(actual: Sequence[Tensor], exact: Sequence[Tensor], eager: Sequence[Tensor], slack: float = 1.0) -> Accuracy | None:
    """Hold results against the float64 ones by the accuracy rule, its limit times `slack`; integers must equal eager's.

    Returns the worst accuracy; AssertionError where a result is wrong.
    """
    worst: Accuracy | None = None
    for number, (ours, wide, plain) in enumerate(zip(actual, exact, eager, strict=True)):
        if not wide.is_floating_point():
            if not torch.equal(ours.long(), plain.long()):
                raise AssertionError(f"result {number} differs from eager PyTorch's in {int((ours != plain).sum())} of {plain.numel()}")
            continue
        found = accuracy(ours, wide, plain)
        if not found.error <= slack * found.limit:  # NaN is wrong
            raise AssertionError(str(found))
        if worst is None or found.error / max(found.limit, 1e-300) > worst.error / max(worst.limit, 1e-300):
            worst = found
    return worst


@dataclasses.dataclass(frozen=True)
class Ready:
    """An implementation that has passed: what to call, on the inputs as it wants them."""

    rival: Rival
    run: Callable[..., Any]
    accuracy: Accuracy | None


def prepare(case: Case, rival: Rival, exact: list[Tensor], eager: list[Tensor]) -> Ready | Row:
    """Build an implementation and hold it against the reference: ready to be timed, or the row that says why not."""
    try:
        run = rival.build()
        if not rival.whole:
            adapted = rival.adapt(case.inputs) if rival.adapt else case.inputs
            run(*adapted.args, **adapted.keywords)
            return Ready(rival, run, None)
        inputs = rival.adapt(case.inputs) if rival.adapt else case.inputs
        slack = 1.0 if rival.name == OURS else RIVAL_SLACK
        return Ready(rival, run, verify(call(case, run, inputs), exact, eager, slack))
    except AbsentError as error:
        return case.row(rival.name, ABSENT, note=str(error))
    except AssertionError as error:
        return case.row(rival.name, REFUSED, note=f"wrong, so not timed: {error}")
    except Exception as error:  # whatever a rival raises is its own row
        return case.row(rival.name, ERROR, note=first_line(error))


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


# ------------------------------------------------------------------ measure


@torch.no_grad()
def measure(case: Case, roof: Roof, *, budget: float, leave_out: dict[str, str] | None = None) -> Iterator[Row]:
    """Rows of all implementations of a case, `budget` seconds of timing each. `leave_out`: reasons by name."""
    left = leave_out or {}
    with exact_float32(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers, about code that isn't theirs
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        try:
            wide = widen(case.inputs)
            exact = call(case, case.reference, wide)
            del wide
            eager = call(case, case.reference, case.inputs)
        except Exception as error:
            yield case.row(EAGER, ERROR, note=f"the reference failed: {first_line(error)}")
            return
        ready: list[Ready] = []
        for rival in case.implementations:
            if rival.name in left:
                yield case.row(rival.name, "left out", note=left[rival.name])
                continue
            found = prepare(case, rival, exact, eager)
            if isinstance(found, Ready):
                ready.append(found)
            else:
                yield found
        del exact, eager
        yield from _timed(case, ready, roof, budget)


def rotating(ready: Ready, copies: Sequence[Inputs]) -> Run:
    """The implementation on copies of the inputs, laid out as it wants them."""
    laid_out = [ready.rival.adapt(inputs) if ready.rival.adapt else inputs for inputs in copies]
    run = ready.run

    def once(number: int) -> Any:
        inputs = laid_out[number]
        return run(*inputs.args, **inputs.keywords)

    return once


def _timed(case: Case, ready: list[Ready], roof: Roof, budget: float) -> Iterator[Row]:
    device = case.setting.device
    count = copies_of(case.cost.bytes, case.inputs.nbytes, device)
    copies = [case.inputs, *(clone(case.inputs) for _ in range(count - 1))]
    if device.type == "cuda":
        eager = None
        for one in sorted(ready, key=lambda one: one.rival.name != EAGER):
            try:
                timing = time_on_gpu(rotating(one, copies), count, budget)
            except Exception as error:
                yield case.row(one.rival.name, ERROR, note=first_line(error))
                continue
            eager = eager or (timing if one.rival.name == EAGER else None)
            yield _row(case, one, timing, eager, roof, count)
        return
    runs = {one.rival.name: rotating(one, copies) for one in ready}
    timings = time_on_cpu(runs, count, budget) if runs else {}
    for one in ready:
        yield _row(case, one, timings[one.rival.name], timings.get(EAGER), roof, count)


def _row(case: Case, one: Ready, timing: Timing, eager: Timing | None, roof: Roof, copies: int) -> Row:
    cost, seconds = case.cost, timing.median
    figures: Row = {
        "median_us": 1e6 * seconds,
        "p20_us": 1e6 * timing.p20,
        "p80_us": 1e6 * timing.p80,
        "speedup": eager.median / seconds if eager is not None else None,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gbps": cost.bytes / seconds / 1e9,
        "tflops": cost.flops / seconds / 1e12,
        "bound": roof.bound(cost.bytes, cost.flops),
        "roof_share": roof.seconds(cost.bytes, cost.flops) / seconds,
        "samples": timing.samples,
        "copies": copies,
        "method": timing.method,
    }
    if one.accuracy is not None:
        figures |= {"error": one.accuracy.error, "eager_error": one.accuracy.eager, "error_limit": one.accuracy.limit}
        if not one.accuracy.ok:
            figures["note"] = "over the rule"
    if not one.rival.whole:
        figures |= {"note": "a part", "part": True}
    return case.row(one.rival.name, OK, **figures)
