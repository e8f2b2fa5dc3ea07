"""Rows out of a process of their own: a generator runs in a child, and its rows come back line by line, as they are made.

A child has its own device context, memory and compile caches, and may die or be stopped without taking the run with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from .offline.child import load_entry
from .rows import ERROR, LEFT_OUT, Row

MARK = "bench-row "  # what a child prints beside its rows is its own business


def stream(
    entry: str, arguments: dict[str, Any], *, timeout: float, failed: Row, environment: dict[str, str] | None = None
) -> Iterator[Row]:
    """Call the generator `entry` ("package.module:function") with JSON-able `arguments` in a new process and yield its rows.

    Where the child fails, a last row is `failed` with the end of what it said; where it takes longer than `timeout` seconds it is
    stopped, and that row says so.
    """
    python_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    surroundings = {**os.environ, "PYTHONPATH": python_path, **(environment or {})}
    command = [sys.executable, "-m", __spec__.name, entry, json.dumps(arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings, start_new_session=True)
    assert child.stdout is not None and child.stderr is not None
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.extend(child.stderr or ()), daemon=True)
    listener.start()
    until, timer = time.monotonic() + timeout, threading.Timer(timeout, stop, (child,))
    timer.start()
    try:
        for line in child.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
        code = child.wait()
        listener.join(1)
        if time.monotonic() >= until:
            yield {**failed, "status": LEFT_OUT, "note": f"stopped after {timeout:.0f} s: the time of this run is up"}
        elif code:
            last = next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")
            yield {**failed, "status": ERROR, "note": last[:300]}
    finally:
        timer.cancel()
        if child.poll() is None:
            stop(child)
            child.wait()


def stop(child: subprocess.Popen[str]) -> None:
    """End a child and what it has started: its session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def answer(entry: str, arguments: str) -> None:
    """The child's side of `stream`."""
    for row in load_entry(entry)(**json.loads(arguments)):
        print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    answer(*sys.argv[1:])
