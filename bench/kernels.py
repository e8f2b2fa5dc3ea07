"""`granite-kernels bench kernels`: every operation against eager PyTorch, torch.compile and the library's best, as rows.

On a GPU each file of operations runs in a process of its own: a kernel that faults takes the device's context with it.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from granite_kernels.model.config import GraniteConfig

from granite_kernels.errors import GraniteError
from granite_kernels.weight import DENSE

from .child import stream
from .harness import COMPILED, EAGER, OURS, Case, first_line, measure
from .roof import Roof, measure_roof
from .rows import ERROR, LEFT_OUT, OK, Row, key
from .shapes import Setting

FILES = ("linear", "attention_decode", "attention", "moe", "norm", "rope", "swiglu", "embed", "sample")
FORMATS = {"q4_k_m": "q4_k", "int4": "int4_g128", "none": DENSE}  # what a matrix of the model's format is stored as
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARES = {"linear": 6, "moe": 3}  # of the time, against 1: where most is to be measured
LONG = "attention_decode"  # what is measured at every context ...
SLOTS = {"cpu": 1 << 14, "cuda": 1 << 18}  # ... of at most so many slots in all sequences together
TIMING = 0.3  # seconds an implementation


def cases(file: str, setting: Setting, ops: Sequence[str] = ()) -> Iterator[Case]:
    """The cases of a file, of the operations `ops` or of all."""
    module = importlib.import_module(f".bench_{file}", __package__)
    return (case for case in module.cases(setting) if not ops or case.op in ops)


def files_of(ops: Sequence[str]) -> list[str]:
    """The files that hold `ops` (names of operations or of files). Raises GraniteError for an unknown name."""
    from granite_kernels import reference

    known: dict[str, str] = {file: file for file in FILES}
    for file in FILES:
        module = importlib.import_module(f"{reference.__name__}.{file}")
        known |= {name: file for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    for name in ops:
        if name not in known:
            raise GraniteError(f"there is no operation {name!r} to measure; the files of operations are {', '.join(FILES)}")
    return list(dict.fromkeys(known[name] for name in ops)) or list(FILES)


def run(
    *,
    preset: str = "3.1-2b",
    ops: Sequence[str] = (),
    tokens: Sequence[int] = (),
    formats: Sequence[str] = (),
    contexts: Sequence[int] = (),
    dtype: str | None = None,
    device: str | None = None,
    quick: bool = False,
    minutes: float | None = None,
    done: Sequence[tuple[Any, ...]] = (),
) -> Iterator[Row]:
    """Rows of the roof and of all operations, as they are measured. What is left empty is chosen for the device. `done`: keys of rows
    that are there already; operations whose eager row is one aren't measured again.

    Raises GraniteError for unknown names before anything is measured.
    """
    from granite_kernels.model.loading import resolve_device

    where = resolve_device(device)
    on_gpu = where.type == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if dtype not in DTYPES:
        raise GraniteError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    GraniteConfig.preset(preset)
    files = files_of(ops)
    tokens = tuple(tokens) or ((1,) if quick else (1, 8, 512 if on_gpu else 64))
    formats = tuple(formats) or (DENSE,)
    contexts = tuple(contexts) or ((1024,) if quick else (1024, 16384, 131072) if on_gpu else (1024, 16384))
    seconds = 60 * (minutes or (0.7 if quick else (8 if on_gpu else 4)))
    until = time.monotonic() + seconds
    roof = measure_roof(where, DTYPES[dtype], quick=quick)
    yield from roof.rows(DTYPES[dtype])
    names = [name for name in ops if name not in FILES]
    for place, file in enumerate(files):
        left = max(until - time.monotonic(), 0.0)
        share = left * SHARES.get(file, 1) / sum(SHARES.get(name, 1) for name in files[place:])
        arguments: dict[str, Any] = dict(
            file=file,
            preset=preset,
            ops=names,
            tokens=list(tokens),
            formats=list(formats),
            contexts=list(contexts),
            dtype=dtype,
            device=str(where),
            quick=quick,
            roof=[roof.copy, roof.read, roof.matmul],
            until=time.monotonic() + share,
            done=[list(one) for one in done if one[0] == "kernel"],
        )
        if on_gpu:
            failed = {"kind": "kernel", "op": file, "size": "", "tokens": 0, "format": "", "dtype": dtype, "implementation": ""}
            yield from stream(f"{__name__}:run_file", arguments, timeout=share + 30, failed=failed)
        else:
            yield from run_file(**arguments)


def run_file(
    *,
    file: str,
    preset: str,
    ops: Sequence[str],
    tokens: Sequence[int],
    formats: Sequence[str],
    contexts: Sequence[int],
    dtype: str,
    device: str,
    quick: bool,
    roof: Sequence[float],
    until: float,
    done: Sequence[Sequence[Any]] = (),
) -> Iterator[Row]:
    """The rows of one file of operations."""
    known = frozenset(map(tuple, done))
    config, where = GraniteConfig.preset(preset), torch.device(device)
    left = {}
    if quick:
        left[COMPILED] = "--quick: compiling takes longer than measuring"
    for count, context, name in itertools.product(tokens, contexts if file == LONG else contexts[:1], formats):
        if context == contexts[0] or count * context <= SLOTS[where.type]:
            setting = Setting(config, count, context, FORMATS.get(name, name), where, DTYPES[dtype])
            yield from run_setting(
                file, setting, ops, Roof(*roof), left, until, 0.1 if quick else TIMING, first=name == formats[0], done=known
            )


def run_setting(
    file: str,
    setting: Setting,
    ops: Sequence[str],
    roof: Roof,
    left: dict[str, str],
    until: float,
    budget: float,
    *,
    first: bool,
    done: frozenset[tuple[Any, ...]] = frozenset(),
) -> Iterator[Row]:
    """The rows of a file at one size; what takes no matrix only with the `first` format. Not of what is `done`, by the keys of its rows."""
    needed = (EAGER,) if setting.device.type == "cpu" else (EAGER, OURS)  # ours comes right after eager
    try:
        for case in cases(file, setting, ops):
            if not (first or case.packs) or all(key(case.row(name, OK)) in done for name in needed):
                continue
            if time.monotonic() > until:
                yield case.row("all", LEFT_OUT, note="the time of this run is up; --minutes gives more")
                continue
            yield from measure(case, roof, budget=budget, leave_out=left)
            torch._dynamo.reset()
    except Exception as error:  # a case that can't even be made leaves the others alone
        blank: dict[str, Any] = {"kind": "kernel", "op": file, "size": "", "dtype": str(setting.dtype).removeprefix("torch.")}
        yield {
            **blank,
            "tokens": setting.tokens,
            "format": setting.format,
            "implementation": "",
            "status": ERROR,
            "note": first_line(error),
        }
