"""Whether something fits, asked before it is allocated: the answer says what was needed, what there is, and what would fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from granite_kernels.errors import GraniteError

from .config import GraniteConfig

MARGIN = 0.95  # of what is free: the rest is for what isn't counted


def available(device: torch.device) -> int | None:
    """Free bytes on `device`; None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def fits(need: int, device: torch.device) -> bool:
    """Whether `need` bytes are free on `device`, as far as the system tells."""
    free = available(device)
    return free is None or need <= MARGIN * free


def check_weights(need: int, kind: str, device: torch.device, others: Mapping[str, int]) -> None:
    """Raise GraniteError where `need` bytes of weights, of `kind`, don't fit.

    others: what loading the same model takes by the option that does so ("quantization='q8_0'"), the most exact first.
    """
    free = available(device)
    if free is None or fits(need, device):
        return
    fitting = [f"{option} would fit ({size / 1e9:.2f} GB)" for option, size in others.items() if size < need and fits(size, device)]
    hint = fitting[0] if fitting else "a smaller model, or a device with more memory, is needed"
    raise GraniteError(f"out of memory: the weights take {need / 1e9:.2f} GB in {kind}, {free / 1e9:.2f} GB are free on {device}; {hint}")


def check_cache(config: GraniteConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise GraniteError where a cache of `context` tokens for `batch` rows doesn't fit."""
    free, token = available(device), batch * config.cache_bytes_per_token(dtype)
    if free is None or context * token <= MARGIN * free:
        return
    raise GraniteError(
        f"out of memory: a cache of {context} tokens for a batch of {batch} takes {context * token / 1e9:.2f} GB in {name_of(dtype)}, "
        f"{free / 1e9:.2f} GB are free on {device}; {int(MARGIN * free) // token} tokens would fit"
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
