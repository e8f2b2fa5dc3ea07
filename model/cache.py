"""The KV cache: an argument and a value, never hidden state.

k and v [layers, batch, kv_heads, context, head_dim]. `lengths` int32 [batch] counts the slots in use and `starts` int32 [batch] the
padding in front of each row; both live on the device, where the kernels read and the decode step advances them. `length` is what
the host knows of them: the slots in use by the longest row.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .config import GraniteConfig
from .room import check_cache

BLOCK = 256  # contexts are multiples of this, so that strides stay aligned and few shapes occur


def round_up(value: int, multiple: int = BLOCK) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass
class Cache:
    """Keys and values of every layer for one batch."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    starts: Tensor
    length: int = 0

    @classmethod
    def allocate(cls, config: GraniteConfig, batch: int, context: int, *, dtype: torch.dtype, device: torch.device) -> Cache:
        """An empty cache of at least `context` slots a row."""
        check_cache(config, batch, context, dtype, device)
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, round_up(context), config.head_dim)
        k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        lengths, starts = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2))
        return cls(k, v, lengths, starts)

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def context(self) -> int:
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """k and v of one layer, [batch, kv_heads, context, head_dim] each."""
        return self.k[index], self.v[index]

    def advance(self, tokens: int) -> None:
        """Count `tokens` new slots of every row as used."""
        self.lengths += tokens
        self.length += tokens

    def crop(self, length: int) -> None:
        """Forget all slots from `length` on."""
        self.lengths.fill_(length)
        self.length = length

    def grow(self, context: int) -> None:
        """Make room for `context` slots, keeping what is stored. New tensors are allocated only where there are too few."""
        if context <= self.context:
            return
        shape = (*self.k.shape[:3], round_up(context), self.k.shape[4])
        for name in ("k", "v"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(shape)
            new[:, :, :, : self.length].copy_(old[:, :, :, : self.length])
            setattr(self, name, new)

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; rows int64 [new batch]."""
        for name in ("k", "v"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(old.shape[0], rows.numel(), *old.shape[2:])
            new[:, :, :, : self.length].copy_(old[:, rows, :, : self.length])
            setattr(self, name, new)
        self.lengths, self.starts = self.lengths[rows], self.starts[rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """transformers' name for the slots in use."""
        return self.length
