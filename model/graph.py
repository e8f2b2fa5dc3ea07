"""The decode step as a CUDA graph: one launch a token instead of some two hundred.

There is no second decode loop: what is captured is `step.step` over the same buffers. A graph belongs to the addresses that it
saw; whoever replaces a buffer, the cache or the weights drops it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARMUPS = 2  # eager runs before the capture: kernels are compiled and libraries initialised in them


def warm(run: Callable[[], None], restore: list[tuple[Tensor, Tensor]]) -> None:
    """Run the step eagerly, as it must have been before it is captured; `restore`: (buffer, its value), written back."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    _write_back(restore)


class CapturedStep:
    """`run` captured; call it to replay."""

    def __init__(self, run: Callable[[], None], restore: list[tuple[Tensor, Tensor]]) -> None:
        """Capture `run`, which has been `warm`ed. `restore` holds (buffer, its value) pairs, written back after the capture."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            run()
        _write_back(restore)

    def __call__(self) -> None:
        self.graph.replay()


def _write_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in pairs:
        buffer.copy_(value)
