"""How much workspace the largest decode step of a model needs."""

from __future__ import annotations

from torch import Tensor

from granite_kernels.kernels.attention_decode import workspace_size as attention_workspace
from granite_kernels.launch import DECODE_TOKENS, matrix_launch, target

from .config import GraniteConfig


def workspace_size(config: GraniteConfig, like: Tensor) -> tuple[int, int]:
    """(tickets, partials): the most that any launch of 1 to 16 tokens takes on the device of `like`. Launches share it in turn."""
    where, head_dim = target(like), config.head_dim
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    inner = config.shared_intermediate_size if config.is_moe else config.intermediate_size
    matrices = [  # (rows, columns, half of the pairs)
        ((heads + 2 * kv_heads) * head_dim, hidden, head_dim // 2),
        (hidden, heads * head_dim, 8),
        (config.vocab_size, hidden, 8),
        *([(2 * inner, hidden, inner), (hidden, inner, 8)] if inner else []),
    ]
    sizes = [(1, 1)]
    for tokens in range(1, DECODE_TOKENS + 1):
        sizes += [matrix_launch(rows, columns, tokens, where).workspace(rows, half) for rows, columns, half in matrices]
        for batch in (b for b in range(1, tokens + 1) if tokens % b == 0):
            sizes.append(attention_workspace(batch, kv_heads, config.group, head_dim, tokens // batch, where))
    return max(tickets for tickets, _ in sizes), max(partials for _, partials in sizes)
