"""The header of a report: which machine, which versions, which commit, when, and how it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("granite-kernels", "torch", "triton", "transformers", "liger-kernel", "flash-attn", "llama-cpp-python", "numpy")
SMI_FIELDS = (
    "driver_version",
    "clocks.max.sm",
    "clocks.max.mem",
    "clocks.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
    "mig.mode.current",
)
METHOD = (
    "Results are verified before they are timed: error against float64 at most twice eager PyTorch's plus one unit in the last place. "
    "GPU kernels: CUDA graphs that rotate over copies of the inputs beyond three times the last cache, median and 20th to 80th "
    "percentile of the replays. CPU: perf_counter, implementations in turns. End to end: wall clock of whole requests, mean and "
    "deviation of the repeats after a warm-up; greedy, nothing stops early; every implementation in a process of its own with the same "
    "weights, dtype, prompts, numbers of tokens and threads, on a CPU in turns, request by request. Roofs are measured in the same run."
)


def header(device: torch.device, **more: Any) -> dict[str, Any]:
    """Plain values; what the machine doesn't tell is left out."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "kind": "gpu" if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "method": METHOD,
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["gpu"] = gpu_facts(device)
    return found | more


class Busy:
    """How much of the processors other programs use between its making and `others` (Linux; elsewhere nobody tells)."""

    def __init__(self) -> None:
        self._begun, self._before = time.monotonic(), self._seconds()

    def others(self) -> float | None:
        """Processors on average that other programs kept busy, or that a host took away."""
        after = self._seconds()
        if self._before is None or after is None:
            return None
        return round(max(after - self._before, 0.0) / max(time.monotonic() - self._begun, 1e-3), 2)

    @staticmethod
    def _seconds() -> float | None:
        """Seconds of all processors that were spent neither idle nor on this process and those that it has started and ended."""
        try:
            told = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
        except (OSError, ValueError):
            return None
        idle, own = told[3] + told[4], os.times()
        return (sum(told) - idle) / os.sysconf("SC_CLK_TCK") - own.user - own.system - own.children_user - own.children_system


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """What torch and nvidia-smi tell of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", f"--id={device.index or 0}"]
        told = _said(query)
        if told is not None:
            facts |= dict(zip(SMI_FIELDS, (value.strip() for value in told.split(",")), strict=False))
    return facts


def versions() -> dict[str, str]:
    """Versions of what is measured and compared with; what is absent is named so."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found | {"llama-bench": "installed" if shutil.which("llama-bench") else "absent"}


def commit() -> str | None:
    """The commit of the checkout that this file lies in, marked where it has changes."""
    git, here = shutil.which("git"), Path(__file__).resolve().parent
    head = _said([git, "-C", str(here), "rev-parse", "--short=12", "HEAD"]) if git else None
    if git is None or head is None:
        return None
    return head + (" with changes" if _said([git, "-C", str(here), "status", "--porcelain", "--untracked-files=no"]) else "")


def _said(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def slug(name: str) -> str:
    """A device's name as a file is called: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return "-".join("".join(c.lower() if c.isalnum() else " " for c in name).split())
