"""What the device can do, measured in the same run as what is held against it.

copy    bytes read and written a second by a copy         read    bytes read a second by a product of a matrix and a vector, or by a sum
matmul  floating-point operations a second of a square product, in the dtype of the benchmark

Of each the fastest sample counts, since a roof is what can be reached; the roof of memory is the better of copy and read, so that no
share is flattered.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from .rows import OK, Row
from .timing import COLD, last_cache, time_on_cpu, time_on_gpu


@dataclasses.dataclass(frozen=True)
class Roof:
    """Bytes a second of a copy and of reading, operations a second of a product."""

    copy: float
    read: float
    matmul: float

    @property
    def bandwidth(self) -> float:
        return max(self.copy, self.read)

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least time that the roof leaves for so many bytes and operations."""
        return max(nbytes / self.bandwidth, flops / self.matmul)

    def bound(self, nbytes: float, flops: float) -> str:
        return "memory" if nbytes / self.bandwidth >= flops / self.matmul else "compute"

    def rows(self, dtype: torch.dtype) -> list[Row]:
        name = str(dtype).removeprefix("torch.")
        return [
            {"kind": "roof", "what": "copy", "status": OK, "gbps": self.copy / 1e9},
            {"kind": "roof", "what": "read", "status": OK, "gbps": self.read / 1e9},
            {"kind": "roof", "what": f"matmul {name}", "status": OK, "tflops": self.matmul / 1e12},
        ]


def measure_roof(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Roof:
    """Measure the roof of `device` for `dtype`: about a second on a GPU, two on a CPU."""
    on_gpu = device.type == "cuda"
    nbytes = 1 << 30 if on_gpu else COLD * last_cache(device) // (1 << 20) * (1 << 20)  # as cold as what is held against it
    size = 8192 if on_gpu else (768 if quick else 1536)
    source = torch.zeros(nbytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    values = source.view(dtype)
    matrix, vector = values.view(-1, 8192), torch.zeros(8192, dtype=dtype, device=device)
    runs = {
        "copy": lambda _: target.copy_(source),
        "read": lambda _: matrix @ vector,
        "sum": lambda _: values.sum(),
        "matmul": lambda _: torch.nn.functional.linear(left, right),  # a weight's layout; the other is ten times slower in bf16 on a CPU
    }
    budget = 0.3 if quick or on_gpu else 1.0
    with torch.no_grad(), exact_float32():
        if on_gpu:
            times = {name: time_on_gpu(run, 1, budget) for name, run in runs.items()}
        else:
            times = {name: time_on_cpu({name: run}, 1, budget)[name] for name, run in runs.items()}
    read = min(times["read"].best, times["sum"].best)
    return Roof(2 * nbytes / times["copy"].best, nbytes / read, 2 * size**3 / times["matmul"].best)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 in float32: tf32 off within, afterwards as it was."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
