"""Interpreter and compiler in processes of their own: a function is called in a child and its JSON result comes back.

    from granite_kernels.bench.offline import compiled

    def decode_launches():                      # in a module or file that the child can import
        linear(torch.empty(1, 2048, dtype=torch.bfloat16), weight(...))

    for metrics in compiled("tests/compile_cases.py:decode_launches", archs=(80, 90, 120), streamed=("planes.0",)):
        assert metrics.spills == 0

By hand: `python -m granite_kernels.bench.offline FILE.py:FUNCTION --arch 90`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .metrics import Metrics

MARK = "offline-result "  # what a child prints beside its result is its own business


def load_entry(entry: str) -> Callable[..., Any]:
    """The function that `package.module:function` or `path/file.py:function` names."""
    place, _, name = entry.rpartition(":")
    module = _load_file(place) if place.endswith(".py") else importlib.import_module(place)
    function: Callable[..., Any] = getattr(module, name)
    return function


def _load_file(path: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} can't be loaded")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # triton.jit looks the module of a function up by name
    specification.loader.exec_module(module)
    return module


def in_child(entry: str, *args: Any, interpret: bool, timeout: float = 600) -> Any:
    """Call `entry` with JSON-able arguments in a new process, interpreted or compiled, and return its JSON-able result.

    Raises RuntimeError with the last lines of what the child said where it fails or takes longer than `timeout` seconds.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", __package__, "--call", json.dumps([entry, *args])]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{entry} took longer than {timeout:.0f} s") from None
    answer = next((line for line in reversed(result.stdout.splitlines()) if line.startswith(MARK)), None)
    if result.returncode or answer is None:
        raise RuntimeError(f"{entry} failed in its process:\n" + "\n".join(result.stderr.splitlines()[-25:]))
    return json.loads(answer.removeprefix(MARK))


def answer(call: str) -> None:
    """The child's side of `in_child`."""
    entry, *args = json.loads(call)
    print(MARK + json.dumps(load_entry(entry)(*args)))


def compiled(
    entry: str,
    archs: Sequence[int] = (90,),
    *,
    args: Sequence[Any] = (),
    streamed: Sequence[str] = (),
    streamed_bytes: dict[str, int] | None = None,
    dram_bytes: dict[str, int] | None = None,
    timeout: float = 600,
) -> list[Metrics]:
    """Call `entry` with `args` under `capture` in a child, once for each architecture -> the metrics of every launch, in order.

    `streamed` names the arguments of kernels that are read exactly once by loads marked evict_first (weights, cache): with
    it the dynamic instruction counts are computed. `streamed_bytes` and `dram_bytes` give bytes by kernel name instead.
    Raises RuntimeError with the child's last lines, so that a kernel that doesn't compile, or needs more shared memory than
    the architecture has, fails with the compiler's words.
    """
    from .metrics import from_json

    arguments = (entry, list(args), list(archs), list(streamed), streamed_bytes or {}, dram_bytes or {})
    records = in_child(f"{__package__}.stages:compile_stage", *arguments, interpret=False, timeout=timeout)
    return [from_json(record) for record in records]
