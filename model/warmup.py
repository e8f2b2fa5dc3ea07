"""The requests that between them launch every kernel that a model can launch, so that none is compiled later.

What is compiled for a launch depends on how many tokens it serves, and on little else: sizes that change from request to request are
not specialised on. The classes are those of launch.py.

    matrices            1, 2 to 8, 9 to 16 tokens; more go through the library's product and the row-wise kernels
    packed matrices     those of TILED_TOKENS, too, and more
    head                the same classes of rows in the batch, since only a row's last token gets logits
    decode attention    1 token a row, up to 8 query rows a kv head, up to 16
"""

from __future__ import annotations

from collections.abc import Iterator

from granite_kernels.launch import DECODE_TOKENS, TILED_TOKENS

NEW = 8  # tokens after the last prompt, so that a step is captured


def requests(batch: int, context: int, *, kernels: bool, packed: bool) -> Iterator[tuple[int, int, int]]:
    """(rows, tokens a row, new tokens) of each request, the last being `batch` rows that fill `context`.

    `kernels`: Triton's run; `packed`: some weights are.
    """
    if kernels:
        for rows in (1, 2, 9):  # as a step of so many rows
            yield rows, 1, 1
        more = (DECODE_TOKENS, *(TILED_TOKENS if packed else ()))
        for tokens in (2, 9, *(bound + 1 for bound in more)):  # 9 query rows at least, whatever the heads that share a kv head
            if tokens < context:
                yield 1, tokens, 1
    new = max(min(NEW, context - 1), 1)
    yield batch, max(context - new, 1), new
