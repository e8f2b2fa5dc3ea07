"""Memory and energy of a run: the GPU's allocator and NVML, or the process's own size on a CPU."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")


def forget_peak() -> bool:
    """Begin the process's peak anew at what it holds now; whether the system (Linux) lets us."""
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
        return True
    return False


def peak() -> int:
    """The most bytes the process held since `forget_peak` or, where that can't be, since it began."""
    with contextlib.suppress(OSError):
        status = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Meters:
    """`start`, run something, then `memory()`; `joules()` before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._handle: Any = None
        self._since_start = False
        if device.type == "cuda":
            with contextlib.suppress(Exception):  # whatever NVML lacks here, energy isn't told
                import pynvml

                pynvml.nvmlInit()
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
                self._nvml = pynvml

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._since_start = forget_peak()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give cached memory back after running out of it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, int | str]:
        """Peak bytes: allocated and reserved on a GPU; on a CPU what the process held at most since `start`, everything included."""
        if self.device.type == "cuda":
            return {
                "peak_allocated": torch.cuda.max_memory_allocated(self.device),
                "peak_reserved": torch.cuda.max_memory_reserved(self.device),
            }
        return {"peak_allocated": peak(), "memory_of": "process" if self._since_start else "process, loading included"}

    def joules(self) -> float | None:
        """The GPU's energy counter; None where there is none."""
        if self._handle is None or not hasattr(self, "_nvml"):
            return None
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
