"""How much workspace the launches of a model need."""

from __future__ import annotations

import itertools

from torch import Tensor

from granite_kernels.kernels.attention_decode import workspace_size as attention_workspace
from granite_kernels.kernels.moe import workspace_size as experts_workspace
from granite_kernels.launch import DECODE_TOKENS, TILED_TOKENS, target
from granite_kernels.linear.launches import GATE_UP, NEIGHBOURS
from granite_kernels.linear.launches import workspace_size as matrix_workspace
from granite_kernels.linear.tiled import workspace_size as tiled_workspace
from granite_kernels.weight import DENSE, Part

from .config import GraniteConfig
from .granite import Weights

Matrix = tuple[tuple[int, ...], int, int, tuple[str, ...]]  # ends of the parts, columns, `half` (launches.py), formats of the parts


def workspace_size(config: GraniteConfig, like: Tensor, weights: Weights | None = None) -> tuple[int, int]:
    """(tickets, partials): the most that any launch takes on the device of `like`. Launches share it in turn.

    weights: None for dense ones.
    """
    where, sizes = target(like), [(1, 1)]
    matrices = _dense(config) if weights is None else _matrices(config, weights)
    for tokens in range(1, DECODE_TOKENS + 1):
        sizes += [matrix_workspace(*matrix, tokens, where) for matrix in matrices]
        if config.is_moe:
            downs = {DENSE} if weights is None else {layer.experts.down.parts[0].format for layer in weights.layers if layer.experts}
            experts = tokens, config.num_experts_per_tok, config.hidden_size, config.intermediate_size
            sizes += [experts_workspace(*experts, format) for format in downs]
        for batch in (b for b in range(1, tokens + 1) if tokens % b == 0):
            sizes.append(attention_workspace(batch, config.num_key_value_heads, config.group, config.head_dim, tokens // batch, where))
    parts = [] if weights is None else [part for part in weights.modules() if isinstance(part, Part) and part.format != DENSE]
    sizes += [tiled_workspace(shape, tokens, like) for shape in {part.shape for part in parts} for tokens in TILED_TOKENS]
    return max(tickets for tickets, _ in sizes), max(partials for _, partials in sizes)


def _matrices(config: GraniteConfig, weights: Weights) -> set[Matrix]:
    pairs = [(weights.head, NEIGHBOURS)]
    for layer in weights.layers:
        moe = layer.experts
        gate_up, down = (layer.gate_up, layer.down) if moe is None else (moe.shared_gate_up, moe.shared_down)
        pairs += [(layer.qkv, config.head_dim // 2), (layer.o, NEIGHBOURS)]
        pairs += [(weight, half) for weight, half in ((gate_up, GATE_UP), (down, NEIGHBOURS)) if weight is not None]
    return {(tuple(itertools.accumulate(p.shape[0] for p in w.parts)), w.shape[1], half, w.formats) for w, half in pairs}


def _dense(config: GraniteConfig) -> set[Matrix]:
    hidden, heads, kv_heads, head_dim = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    inner = config.shared_intermediate_size if config.is_moe else config.intermediate_size
    shapes = [
        ((heads + 2 * kv_heads) * head_dim, hidden, head_dim // 2),
        (hidden, heads * head_dim, NEIGHBOURS),
        (config.vocab_size, hidden, NEIGHBOURS),
        *([(2 * inner, hidden, GATE_UP), (hidden, inner, NEIGHBOURS)] if inner else []),
    ]
    return {((rows,), columns, half, (DENSE,)) for rows, columns, half in shapes}
