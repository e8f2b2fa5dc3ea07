"""Block sizes and warps as plain functions of shape, format and architecture. No autotuning: the same sizes give the same bits.

Every table names the GPU and the date it was tuned on; "compiled" means chosen from compiled code (registers, loads, instructions
a byte), not yet measured on a card.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

DECODE_TOKENS = 16  # tokens a step, over the whole batch, that the decode kernels take


@dataclasses.dataclass(frozen=True)
class Target:
    """What a launch is shaped for: compute capability (90 for 9.0) and streaming multiprocessors."""

    arch: int
    sms: int


INTERPRETED = Target(arch=90, sms=132)  # on the CPU: the sizes that an H100 would get


def target(tensor: Tensor) -> Target:
    """The target of the device that holds `tensor`."""
    if not tensor.is_cuda:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return Target(major * 10 + minor, torch.cuda.get_device_properties(tensor.device).multi_processor_count)
