"""Rows out of a process of their own: a generator runs in a child, and its rows come back line by line, as they are made.

A child has its own device context, memory and compile caches, and may die or be stopped without taking the run with it. One whose
generator yields TURN waits there until its next row is asked for, so that `in_turns` lets several children work one after another.
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
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from .offline.child import load_entry
from .rows import ERROR, LEFT_OUT, Row

MARK = "bench-row "  # what a child prints beside its rows is its own business
TURN: Row = {"kind": "turn"}  # no row: whoever yields it lets the others go first


def stream(
    entry: str, arguments: dict[str, Any], *, timeout: float, failed: Row, environment: dict[str, str] | None = None
) -> Generator[Row, None, None]:
    """Call the generator `entry` ("package.module:function") with JSON-able `arguments` in a new process and yield its rows.

    Where the child fails, a last row is `failed` with the end of what it said; where it takes longer than `timeout` seconds, not
    counting what it waits for its turn, it is stopped, and that row says so.
    """
    python_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    surroundings = {**os.environ, "PYTHONPATH": python_path, **(environment or {})}
    command = [sys.executable, "-m", __spec__.name, entry, json.dumps(arguments)]
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child = subprocess.Popen(command, text=True, env=surroundings, start_new_session=True, **pipes)
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.extend(child.stderr or ()), daemon=True)
    listener.start()
    alarm = Alarm(timeout, child)
    try:
        for line in child.stdout:
            if not line.startswith(MARK):
                continue
            row = json.loads(line.removeprefix(MARK))
            if row != TURN:
                yield row
                continue
            alarm.pause()
            yield row
            alarm.go_on()
            with contextlib.suppress(BrokenPipeError):  # it died while it waited: its exit code is told below
                child.stdin.write("\n")
                child.stdin.flush()
        code = child.wait()
        listener.join(1)
        if code and alarm.rung():
            yield {**failed, "status": LEFT_OUT, "note": f"stopped after {timeout:.0f} s: the time of this run is up"}
        elif code:
            last = next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")
            yield {**failed, "status": ERROR, "note": last[:300]}
    finally:
        alarm.pause()
        if child.poll() is None:
            stop(child)
            child.wait()


class Alarm:
    """Stops a child after `seconds` of its own time."""

    def __init__(self, seconds: float, child: subprocess.Popen[str]) -> None:
        self.left, self.child = seconds, child
        self.go_on()

    def go_on(self) -> None:
        self.begun, self.timer = time.monotonic(), threading.Timer(max(self.left, 0), stop, (self.child,))
        self.timer.daemon = True
        self.timer.start()

    def pause(self) -> None:
        self.timer.cancel()
        self.left -= time.monotonic() - self.begun

    def rung(self) -> bool:
        return time.monotonic() - self.begun >= self.left


def in_turns(streams: Iterable[Generator[Row, None, None]]) -> Iterator[Row]:
    """The rows of all: each goes on until it yields TURN, then the next does. One alone only stops for itself."""
    waiting = deque(streams)
    try:
        while waiting:
            for row in waiting[0]:
                if row == TURN:
                    waiting.rotate(-1)
                    break
                yield row
            else:
                waiting.popleft()
    finally:
        for one in waiting:
            one.close()


def stop(child: subprocess.Popen[str]) -> None:
    """End a child and what it has started: its session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def answer(entry: str, arguments: str) -> None:
    """The child's side of `stream`."""
    for row in load_entry(entry)(**json.loads(arguments)):
        print(MARK + json.dumps(row), flush=True)
        if row == TURN and not sys.stdin.readline():
            return  # nobody asks any more


if __name__ == "__main__":
    answer(*sys.argv[1:])
