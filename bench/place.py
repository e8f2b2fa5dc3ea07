"""Positions, lengths and a cache of one layer for operations that write into it or read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from granite_kernels.reference.rope import rotary_table

from .harness import Inputs
from .shapes import Setting


def caches(setting: Setting) -> tuple[Tensor, Tensor]:
    """Random k and v [batch, kv_heads, context, head_dim], rounded up to a multiple of 256 slots."""
    batch, tokens = setting.shape
    context = -(-(setting.held + tokens) // 256) * 256
    shape = (batch, setting.config.num_key_value_heads, context, setting.config.head_dim)
    return setting.normal(*shape, seed=8), setting.normal(*shape, seed=9)


def lengths(setting: Setting) -> Tensor:
    return torch.full((setting.shape[0],), setting.held, dtype=torch.int32, device=setting.device)


def places(setting: Setting) -> tuple[Tensor, ...]:
    """(rotary, positions, lengths, k_cache, v_cache), as norm_qkv_rope_append and rope_append end their arguments."""
    config, (batch, tokens) = setting.config, setting.shape
    rotary = rotary_table(setting.held + tokens, config.head_dim, config.rope_theta, dtype=setting.dtype, device=setting.device)
    positions = torch.arange(setting.held, setting.held + tokens, dtype=torch.int32, device=setting.device).repeat(batch, 1)
    return rotary, positions, lengths(setting), *caches(setting)


def empty_slots(setting: Setting) -> Callable[[Inputs], None]:
    """Fills the slots behind those in use with NaN: what isn't written shows."""

    def reset(inputs: Inputs) -> None:
        for cache in inputs.args[-2:]:
            cache[:, :, setting.held :] = float("nan")

    return reset


def written(setting: Setting) -> Callable[[Any, Inputs], list[Tensor]]:
    """q, and the slots that were to be written."""

    def results(q: Tensor, inputs: Inputs) -> list[Tensor]:
        slots = slice(setting.held, setting.held + setting.shape[1])
        return [q, *(cache[:, :, slots] for cache in inputs.args[-2:])]

    return results
