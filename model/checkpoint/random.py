"""Random weights as a checkpoint: the shapes of a configuration without a file."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import GraniteConfig
from .base import Checkpoint, Stored, TensorInfo
from .layout import expected_tensors


class RandomCheckpoint(Checkpoint):
    """Normal weights of standard deviation 0.02 and norms of one, made on `device` when they are read; see Checkpoint.

    The same seed gives the same weights, as the tensors are read in the same order.
    """

    kind = "random"
    concurrent = False

    def __init__(self, config: GraniteConfig, *, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.path, self.gguf_metadata = config, Path("random"), {}
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)
        format = str(dtype).removeprefix("torch.")
        self.tensors = {
            name: TensorInfo(name, expected.shape, format, torch.Size(expected.shape).numel() * dtype.itemsize, self.path, name)
            for name, expected in expected_tensors(config).items()
        }

    def read(self, name: str) -> Stored:
        info = self.tensors[name]
        data = torch.empty(info.shape, dtype=self._dtype, device=self._device)
        if data.dim() == 1:
            data.fill_(1.0)
        else:
            data.normal_(0.0, 0.02, generator=self._generator)
        return Stored(info.format, data, info.shape)

    def close(self) -> None:
        """Nothing to let go of."""
