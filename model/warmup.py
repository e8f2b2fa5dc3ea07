"""The requests that between them launch every kernel that a model can launch, so that none is compiled later.

What is compiled for a launch depends on how many tokens it serves, and on little else: sizes that change from request to request are
not specialised on. The classes are those of launch.py.

    matrices            1, 2 to 8, 9 to 16 tokens; more go through the library's product and the row-wise kernels
    packed matrices     those of TILED_TOKENS, too, and more
    head                the same classes of rows in the batch, since only a row's last token gets logits
    decode attention    1 token a row, up to 8 query rows a kv head, up to 16
    experts             the matrices' classes, apart where the choices are more than the experts; more tokens by how many choose one
"""

from __future__ import annotations

from collections.abc import Iterator

from granite_kernels.launch import DECODE_TOKENS, GROUPED_CHOICES, TILED_TOKENS

NEW = 8  # tokens after the last prompt, so that a step is captured


def requests(
    batch: int, context: int, *, kernels: bool, packed: bool, limit: int, experts: int = 0, top_k: int = 1
) -> Iterator[tuple[int, int, int]]:
    """(rows, tokens a row, new tokens) of each request, the last being `batch` rows that fill `context`.

    `kernels`: Triton's run; `packed`: some weights are; `limit`: tokens that a request may have; of `experts` a token chooses `top_k`.
    """
    if kernels:
        for rows in steps(experts, top_k):
            yield rows, 1, 1
        more = [DECODE_TOKENS, *(TILED_TOKENS if packed else ()), *([GROUPED_CHOICES * experts // top_k] if experts else [])]
        for tokens in (2, 9, *sorted({bound + 1 for bound in more})):  # 9 query rows at least, whatever the heads that share a kv head
            if tokens < limit:
                yield 1, tokens, 1
    new = max(min(NEW, context - 1), 1)
    yield batch, max(context - new, 1), new


def steps(experts: int, top_k: int) -> list[int]:
    """The least tokens of each class that a step's launches are compiled for."""
    classes: dict[tuple[bool, bool, bool], int] = {}
    for tokens in range(1, DECODE_TOKENS + 1):
        classes.setdefault((tokens == 1, tokens <= 8, bool(experts) and tokens * top_k <= experts), tokens)
    return list(classes.values())
