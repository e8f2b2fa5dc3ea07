"""Sizes of a benchmark and what each operation costs: the bytes that have to move at least once, and the operations.

A cost is that of the computation, not of an implementation: who reads something twice is slower, not more expensive.
"""

from __future__ import annotations

import dataclasses

import torch
from granite_kernels.model.config import GraniteConfig
from torch import Tensor

from granite_kernels import formats
from granite_kernels.launch import DECODE_TOKENS
from granite_kernels.weight import DENSE, Part, Weight

# of formats that nothing here quantizes to: where the float16 scales stand in a file's block
SCALES = {"q4_0": (0,), "q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q5_k": (0, 2)}


def random_blocks(format: str, rows: int, columns: int) -> Tensor:
    """Blocks uint8 [rows, row_bytes] of a format in SCALES: any codes, and scales of a thousandth."""
    found = formats.get_gguf(format)
    size = (rows, columns // found.block, found.block_bytes)
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    for place in SCALES[format]:
        blocks[..., place : place + 2] = torch.tensor([0.001], dtype=torch.float16).view(torch.uint8)
    return blocks.view(rows, -1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the cases of all operations are made for. Up to 16 tokens are a decode step of as many sequences, more are one prompt."""

    config: GraniteConfig
    tokens: int
    context: int
    format: str
    device: torch.device
    dtype: torch.dtype

    @property
    def decoding(self) -> bool:
        return self.tokens <= DECODE_TOKENS

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, tokens of a row)."""
        return (self.tokens, 1) if self.decoding else (1, self.tokens)

    @property
    def held(self) -> int:
        """Tokens in the cache before the call."""
        return self.context - 1 if self.decoding else 0

    def normal(self, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return (torch.randn(*shape, generator=generator, device=self.device) * scale).to(self.dtype)

    def weight(self, rows: int, columns: int) -> Weight:
        """A random matrix in the setting's format."""
        matrix = self.normal(rows, columns, scale=columns**-0.5, seed=rows)
        if self.format == DENSE:
            return Weight.dense(matrix)
        if self.format in SCALES:
            blocks = random_blocks(self.format, rows, columns).to(self.device)
            return Weight(Part(self.format, formats.get_gguf(self.format).pack(blocks, (rows, columns)), (rows, columns)))
        return Weight(Part(self.format, formats.get(self.format).quantize(matrix), (rows, columns)))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes that move at least once, operations."""

    bytes: int
    flops: int


def rows_cost(setting: Setting, width: int, tensors: int, shared: int = 0, flops: int = 4) -> Cost:
    """A row-wise operation over `tensors` (read or written) of [tokens, width], `shared` values beside."""
    values = setting.tokens * width
    return Cost(setting.dtype.itemsize * (tensors * values + shared), flops * values)


def product_cost(setting: Setting, weight: Weight, written: int, read: int = 0) -> Cost:
    """A product with `weight`, of whose result `written` values a token are stored; `read` further values are read."""
    rows, columns = weight.shape
    moved = setting.tokens * (columns + written) + read
    return Cost(weight.nbytes + setting.dtype.itemsize * moved, 2 * setting.tokens * rows * columns)


def attention_cost(setting: Setting) -> Cost:
    """Keys and values once, queries and results; two products over the slots that each query sees."""
    config, (batch, tokens) = setting.config, setting.shape
    width = config.num_attention_heads * config.head_dim
    cached = 2 * batch * (setting.held + tokens) * config.num_key_value_heads * config.head_dim
    seen = batch * (tokens * setting.held + tokens * (tokens + 1) // 2)
    return Cost(setting.dtype.itemsize * (cached + 2 * setting.tokens * width), 4 * seen * width)


def step_bytes(config: GraniteConfig, weight_bytes: int, dtype: torch.dtype, context: float, batch: int = 1) -> float:
    """Bytes that a decode step of `batch` sequences reads with `context` tokens each in the cache, of a model of `weight_bytes`.

    Of a mixture of experts those that so many tokens choose on average; an embedding that isn't the head as well gives rows only.
    """
    touched = float(config.active_parameters())
    if config.is_moe:
        experts, chosen = config.num_local_experts, config.num_experts_per_tok
        one = (config.parameters() - config.active_parameters()) / (experts - chosen)
        touched += one * (experts * (1 - (1 - chosen / experts) ** batch) - chosen)
    if not config.tie_word_embeddings:
        touched -= config.vocab_size * config.hidden_size
    return weight_bytes * touched / config.parameters() + batch * context * config.cache_bytes_per_token(dtype)
