"""Memory and energy of a run: the GPU's allocator and NVML, or the process's own size on a CPU."""

from __future__ import annotations

import contextlib
import resource
from typing import Any

import torch


class Meters:
    """`start`, run something, then `memory()`; `joules()` before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._handle: Any = None
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

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give cached memory back after running out of it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, int | str]:
        """Peak bytes: allocated and reserved on a GPU; on a CPU what the process held at most, everything included."""
        if self.device.type == "cuda":
            return {
                "peak_allocated": torch.cuda.max_memory_allocated(self.device),
                "peak_reserved": torch.cuda.max_memory_reserved(self.device),
            }
        return {"peak_allocated": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "memory_of": "process"}

    def joules(self) -> float | None:
        """The GPU's energy counter; None where there is none."""
        if self._handle is None or not hasattr(self, "_nvml"):
            return None
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
