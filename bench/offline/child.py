"""Compiled code from a process whose kernels are interpreted: a function runs in a process of its own, under capture.

    from granite_kernels.bench.offline import compiled

    def decode_launches():                      # in a module that the new process can import
        linear(torch.empty(1, 2048, dtype=torch.bfloat16), weight(...))

    for metrics in compiled("tests.compile_cases:decode_launches", archs=(80, 90, 120), streamed=("planes",)):
        assert metrics.spills == 0

The child prints one JSON record a launch; `python -m granite_kernels.bench.offline MODULE:FUNCTION --arch 90` does the
same by hand.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .metrics import Metrics


def child_environment(interpret: bool) -> dict[str, str]:
    """This process's environment for a child whose kernels are interpreted, or compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return environment


def load_entry(entry: str) -> Callable[..., Any]:
    """`package.module:function` or `path/file.py:function`."""
    place, _, name = entry.rpartition(":")
    if place.endswith(".py"):
        specification = importlib.util.spec_from_file_location(Path(place).stem, place)
        if specification is None or specification.loader is None:
            raise ImportError(f"{place} can't be loaded")
        module = importlib.util.module_from_spec(specification)
        sys.modules[specification.name] = module  # triton.jit looks its functions' module up by name
        specification.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


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
    """Run `entry` ("module:function" or "file.py:function", called with the JSON-able `args`) under capture in a child
    process, once for each architecture, and return the metrics of every launch in order (see `metrics.Metrics`).

    `streamed` names the arguments that are read exactly once (weights, cache): with it the dynamic instruction counts are
    computed. `streamed_bytes` and `dram_bytes` override the bytes by kernel name. Raises RuntimeError with the child's last
    lines where it fails, so a kernel that doesn't compile fails a test with the compiler's message.
    """
    from .metrics import from_json

    request = {"entry": entry, "archs": list(archs), "args": list(args), "streamed": list(streamed)}
    request |= {"streamed_bytes": streamed_bytes or {}, "dram_bytes": dram_bytes or {}}
    result = subprocess.run(
        [sys.executable, "-m", __package__, "--request", json.dumps(request)],
        env=child_environment(interpret=False),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if result.returncode:
        raise RuntimeError(f"{entry} failed under capture:\n" + "\n".join(result.stderr.splitlines()[-25:]))
    records = [line for line in result.stdout.splitlines() if line.startswith(PREFIX)]
    return [from_json(json.loads(line.removeprefix(PREFIX))) for line in records]


PREFIX = "offline-metrics "


def _run(request: dict[str, Any]) -> None:
    from .capture import capture
    from .metrics import measure, to_json

    function = load_entry(request["entry"])
    known: dict[str, Any] = {}
    for arch in request["archs"]:
        with capture(arch) as launches:
            function(*request["args"])
        for launch in launches:
            key = f"{launch.hash} {launch.grid} {launch.arguments}"
            if key not in known:
                known[key] = to_json(
                    measure(launch, request["streamed"], request["streamed_bytes"].get(launch.name), request["dram_bytes"].get(launch.name))
                )
            print(PREFIX + json.dumps({**known[key], "new": launch.new, "site": launch.site}))


def main() -> None:
    """The command line of `python -m granite_kernels.bench.offline`."""
    parser = argparse.ArgumentParser(description="Compile the launches of a function and print their metrics as JSON lines.")
    parser.add_argument("entry", nargs="?", help="module:function or file.py:function")
    parser.add_argument("--arch", type=int, action="append", help="target, as 90; may be repeated")
    parser.add_argument("--streamed", action="append", default=[], help="argument that is read exactly once; may be repeated")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        return _run(json.loads(options.request))
    if not options.entry:
        parser.error("an entry is needed")
    _run(
        {
            "entry": options.entry,
            "archs": options.arch or [90],
            "args": [],
            "streamed": options.streamed,
            "streamed_bytes": {},
            "dram_bytes": {},
        }
    )
