"""Start-up: a new process from its start to the first token, with empty and with filled compile caches. Runs in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from .rows import OK, Row

PROMPT = 16  # tokens


def run(*, implementation: str, model: str, label: str, options: dict[str, Any], cache: str, begun: float) -> Iterator[Row]:
    """One row. `begun`: time.time() when this process was asked for; `cache` names the state of the compile caches."""
    import torch
    from granite_kernels.model.sources import open_model

    from .end_to_end import random_ids
    from .engines import Engine, Ours, stored_format, transformers_from
    from .harness import OURS

    if implementation != OURS:
        import transformers  # noqa: F401  (its import belongs to the start)
    imported = time.time()
    model_ = open_model(model, **options)
    engine: Engine = Ours(model_) if implementation == OURS else transformers_from(model_, implementation)
    ids = random_ids(1, PROMPT, model_.config.vocab_size, model_.device)
    if model_.device.type == "cuda":
        torch.cuda.synchronize()
    loaded = time.time()
    moments = engine.run(ids, 3)  # a prompt and the steps behind it, so that the step is compiled, too
    done = time.time()
    again = time.time()
    engine.run(ids, 3)
    second = time.time() - again
    yield {
        "kind": "startup",
        "model": label,
        "implementation": implementation,
        "format": options.get("quantization") or stored_format(model_),
        "cache": cache,
        "status": OK,
        "import_s": imported - begun,
        "load_s": loaded - imported,
        "first_token_s": done - loaded - (moments[-1] - moments[0]),
        "first_request_s": done - loaded,
        "compile_s": max(done - loaded - second, 0.0),
        "total_s": done - begun - (moments[-1] - moments[0]),
    }
