"""What a model takes and how fast it can be, from its shapes alone.

    total = weights + cache + workspace
    weights     planes of every tensor as the format lays them out; a tied head once
    cache       2 * layers * kv_heads * head_dim * 2 bytes a token, contexts rounded up to 256
    workspace   what else a request allocates: tickets and partial sums of the kernels, the rotary table, buffers of the decode step,
                activations of the largest piece of the prompt, the library's own workspace, and for packed weights the largest matrix
                in 16 bits, which long prompts decode it to

    tokens/s <= batch * bandwidth / (bytes of weights that a step reads + batch * context * cache bytes a token)

A step of a mixture of experts reads, of its E experts, the k that a token chooses or, in a batch, as many as independent choices meet on
average: E * (1 - (1 - k / E)^batch). The bound is arithmetic on a data sheet, not a measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import torch
from granite_kernels.model.cache import BLOCK, round_up
from granite_kernels.model.checkpoint.layout import EMBEDDING, expected_tensors
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.generate import CHUNK
from granite_kernels.model.room import MARGIN

from granite_kernels.formats import GGUF_NAMES, get, get_gguf
from granite_kernels.formats.mix import DENSE, QUANTIZATIONS, format_of
from granite_kernels.launch import TILED_TOKENS

from .gpus import Gpu

LABELS = {"q8_0": "Q8_0", "q6_k": "Q6_K", "q4_k_m": "Q4_K_M"}
ROTARY_ROWS = 4096  # the table of rotations grows in such steps
LIBRARY = {90: 32 << 20}  # bytes of workspace that torch gives cuBLAS, by architecture ...
LIBRARY_ELSEWHERE = 8_519_680  # ... and on all others: 4096 KiB * 2 + 16 KiB * 8


@dataclasses.dataclass(frozen=True)
class Footprint:
    """A model's weights in one format, in bytes. `read`: by a decode step; `largest`: a packed matrix of a layer in 16 bits."""

    label: str
    file: int
    weights: int
    read: int
    bits_per_weight: float
    largest: int = 0


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of a request on a card."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def label(quantization: str | None, dtype: torch.dtype = torch.bfloat16) -> str:
    """How people write it: Q4_K_M, int4; F16 for both kinds of 16 bits."""
    if quantization is None:
        return "F32" if dtype == torch.float32 else "F16"
    return LABELS.get(quantization, quantization)


def footprints(config: GraniteConfig, batch: int = 1, stored: Mapping[str, str] | None = None) -> list[Footprint]:
    """The model in the dtype of its checkpoint and in each quantization, the smallest first.

    `stored`: tensor -> format of a checkpoint that is packed already; it stands for the unquantized one then, as "as stored".
    """
    found = [footprint(config, quantization, batch) for quantization in QUANTIZATIONS]
    found.append(footprint(config, None, batch, stored))
    return sorted(found, key=lambda one: one.weights)


def footprint(config: GraniteConfig, quantization: str | None, batch: int = 1, stored: Mapping[str, str] | None = None) -> Footprint:
    """The weights of `config` in a quantization (None: dense, or as `stored`), read by a step of `batch` rows."""
    width = config.dtype.itemsize if quantization is None and stored is None else 2
    file = weights = largest = values = 0
    read = 0.0
    for name, shape, format in _tensors(config, quantization, stored):
        rows, columns = math.prod(shape[:-1]), shape[-1]
        values += rows * columns
        in_file, in_memory = _sizes(format, rows, columns, width, vector=len(shape) == 1 or ".router." in name)
        file, weights = file + in_file, weights + in_memory
        if name == EMBEDDING and not config.tie_word_embeddings:
            continue  # a step reads a row of it a token
        expert = len(shape) == 3
        read += in_memory * (_met(config, batch) if expert else 1.0)
        if format != DENSE and ".layers." in name and not expert:
            largest = max(largest, 2 * rows * columns * (2 if "gate_proj" in name else 1))  # gate and up are one matrix
    return Footprint(
        "as stored" if stored is not None else label(quantization, config.dtype), file, weights, int(read), 8 * weights / values, largest
    )


def _tensors(
    config: GraniteConfig, quantization: str | None, stored: Mapping[str, str] | None
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, format) of every tensor."""
    split = stored is not None and any(name.endswith("gate_exps.weight") for name in stored)
    for name, expected in expected_tensors(config, split=split).items():
        if quantization is not None:
            format = format_of(quantization, name, expected.shape[-1], layers=config.num_hidden_layers, tied=config.tie_word_embeddings)
        else:
            format = stored[name] if stored is not None else DENSE
        yield name, expected.shape, format


def _sizes(format: str, rows: int, columns: int, width: int, *, vector: bool) -> tuple[int, int]:
    """Bytes of a matrix in a file and in memory. Files of GGUF keep norms and routers in 32 bits."""
    if format == DENSE or format.startswith(("float", "bfloat")):
        return rows * columns * (4 if vector else width), rows * columns * width
    planes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in get(format).layout((rows, columns)))
    if format in GGUF_NAMES:
        return rows * columns // get_gguf(format).block * get_gguf(format).block_bytes, planes
    return planes, planes


def _met(config: GraniteConfig, batch: int) -> float:
    """The share of the experts that the tokens of a step choose between them."""
    return 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** batch


def need(config: GraniteConfig, weights: Footprint, batch: int, context: int, arch: int = 90) -> Need:
    """Bytes of a request of `batch` rows with `context` tokens each, prompt and answer, on a card of `arch`."""
    cache = batch * config.cache_bytes_per_token(activations(config)) * round_up(context)
    return Need(weights.weights, cache, _workspace(config, weights, batch, context, arch))


def activations(config: GraniteConfig) -> torch.dtype:
    """What a GPU computes in, and the cache holds: 16 bits."""
    return config.dtype if config.dtype.itemsize == 2 else torch.bfloat16


def _workspace(config: GraniteConfig, weights: Footprint, batch: int, context: int, arch: int) -> int:
    rotary = 2 * round_up(context, ROTARY_ROWS) * config.head_dim
    step = batch * (config.vocab_size * (2 + 1) + round_up(context) * (8 + 4))  # logits, seen; tokens and uniforms
    library = LIBRARY.get(arch, LIBRARY_ELSEWHERE)
    return activation_bytes(config, weights, batch * min(context, CHUNK["cuda"])) + rotary + step + library + _scratch(config)


def activation_bytes(config: GraniteConfig, weights: Footprint, tokens: int) -> int:
    """The most that a pass of `tokens` tokens through the layers holds at once, in 16 bits."""
    attended = config.num_attention_heads * config.head_dim
    inner = config.intermediate_size * max(config.num_experts_per_tok, 1) + config.shared_intermediate_size
    held = config.hidden_size + 2 * attended + inner  # the stream, q, what attention gave, the inner values of the layer before
    decoded = weights.largest if tokens > TILED_TOKENS[-1] else 0
    product = 2 * tokens * (held + config.hidden_size + 2 * inner) + decoded  # and the normed stream, gate | up
    gated = 2 * tokens * (held + 3 * inner)  # and gate | up, the inner values
    return max(product, gated)


@functools.cache
def _scratch(config: GraniteConfig) -> int:
    """Tickets and partial sums of the kernels at an H100's launch shapes: 2 to 9 MB. 0 where triton isn't installed, which knows."""
    try:
        from granite_kernels.model.scratch import workspace_size
    except ImportError:
        return 0
    return 4 * sum(workspace_size(config, torch.empty(0)))


def fits(total: int, gpu: Gpu) -> bool:
    """As the loader asks: with a margin for what isn't counted."""
    return total <= MARGIN * gpu.usable


def largest_context(config: GraniteConfig, weights: Footprint, batch: int, gpu: Gpu) -> int:
    """The most tokens a row, a multiple of 256 or the model's own limit, that fit on the card; 0 where none do."""
    low, high = 0, -(-config.max_position_embeddings // BLOCK)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(need(config, weights, batch, middle * BLOCK, gpu.arch).total, gpu):
            low = middle
        else:
            high = middle - 1
    return min(low * BLOCK, config.max_position_embeddings)


def bound(config: GraniteConfig, weights: Footprint, batch: int, context: int, bandwidth: float) -> float:
    """Tokens a second that `bandwidth` (GB/s) allows at most, all rows together, with `context` tokens cached in each."""
    step = weights.read + batch * context * config.cache_bytes_per_token(activations(config))
    return batch * bandwidth * 1e9 / step
