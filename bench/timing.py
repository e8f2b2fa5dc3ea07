"""Timing of one call: CUDA graphs that rotate over copies of the inputs on a GPU, interleaved calls on a CPU.

Below about 100 us a timer around single calls measures the host, and a graph that repeats one call measures the cache: an 8 MB weight
stays in 50 MB of L2. So `copies` of the inputs together exceed three times the last cache, and a captured graph goes round them.
On a CPU the implementations take turns, call by call, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

COLD = 3  # times the last cache: what a rotation has to exceed
MOST_COPIES = 256  # of small inputs, which the model finds in the cache, too
MOST_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # of all copies
Run = Callable[[int], object]  # one call, on the inputs' copy of that number


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call. On a GPU a sample is the mean of one replay of the graph, on a CPU a single call."""

    median: float
    p20: float
    p80: float
    best: float
    samples: int
    method: str


def summary(samples: Sequence[float], method: str) -> Timing:
    ordered = sorted(samples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high, ordered[0], len(ordered), method)


def last_cache(device: torch.device) -> int:
    """Bytes of the last cache before memory: a GPU's L2, a CPU's L3 (32 MiB where the system doesn't tell)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 << 20


def copies_of(moved: int, stored: int, device: torch.device) -> int:
    """How many copies make a rotation cold, of inputs that store `stored` bytes, of which a call moves `moved`."""
    wanted = min(math.ceil(COLD * last_cache(device) / max(moved, 1)), MOST_COPIES)
    return max(min(wanted, MOST_BYTES[device.type] // max(stored, 1)), 1)


def time_on_gpu(run: Run, copies: int, budget: float) -> Timing:
    """Seconds a call by triton.testing: a captured rotation or, where an implementation can't be captured, single launches."""
    from triton import testing

    def rotation() -> None:
        for number in range(copies):
            run(number)

    try:
        times = testing.do_bench_cudagraph(rotation, rep=max(int(1e3 * budget / 10), 1), return_mode="all")
        return summary([1e-3 * value / copies for value in times], f"CUDA graph over {copies} copies")
    except RuntimeError:  # it asks the host for something, which a graph can't
        torch.cuda.synchronize()  # raises where the device is lost, not only the capture
        times = testing.do_bench(lambda: run(0), warmup=25, rep=max(int(1e3 * budget), 1), return_mode="all")
        return summary([1e-3 * value for value in times], "launched from the host, L2 cleared")


def time_on_cpu(runs: dict[str, Run], copies: int, budget: float) -> dict[str, Timing]:
    """Seconds a call of each implementation, taking turns until `budget` seconds each are spent (three calls at least)."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(0)
    names = tuple(runs)
    until, number = time.perf_counter() + budget * len(runs), 0
    while number < 3 or (time.perf_counter() < until and number < 1000):
        turn = number % max(len(names), 1)
        for name in (*names[turn:], *names[:turn]):  # who comes first finds the cache as the others left it
            begun = time.perf_counter()
            runs[name](number % copies)
            samples[name].append(time.perf_counter() - begun)
        number += 1
    return {name: summary(times, f"perf_counter, in turns over {copies} copies") for name, times in samples.items()}


def cuda_clock() -> Callable[[], float]:
    """A clock for pytest-benchmark: seconds of the GPU's own time. Differences between two readings are times of events."""
    previous = torch.cuda.Event(enable_timing=True)
    previous.record()
    passed = 0.0

    def read() -> float:
        nonlocal previous, passed
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        passed += 1e-3 * previous.elapsed_time(now)  # from one reading to the next: a float32 of milliseconds, too coarse for long
        previous = now
        return passed

    return read
