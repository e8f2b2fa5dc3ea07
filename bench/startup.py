"""Start-up: a new process from its start to the first token, with empty and with filled compile caches. Runs in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .rows import OK, Row

if TYPE_CHECKING:
    import torch

    from .engines import Engine

PROMPT = 16  # tokens


def run(*, implementation: str, model: str, label: str, options: dict[str, Any], cache: str, begun: float) -> Iterator[Row]:
    """One row. `begun`: time.time() when this process was asked for; `cache` names the state of the compile caches."""
    import torch

    from .end_to_end import random_ids
    from .harness import OURS

    if implementation != OURS:
        import transformers  # noqa: F401  (its import belongs to the start)
    imported = time.time()
    engine, config, device, about = opened(implementation, model, options)
    ids = random_ids(1, PROMPT, config.vocab_size, device)
    if device.type == "cuda":
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
        "cache": cache,
        "status": OK,
        **about,
        "import_s": imported - begun,
        "load_s": loaded - imported,
        "first_token_s": done - loaded - (moments[-1] - moments[0]),
        "first_request_s": done - loaded,
        "compile_s": max(done - loaded - second, 0.0),
        "total_s": done - begun - (moments[-1] - moments[0]),
    }


def opened(implementation: str, model: str, options: dict[str, Any]) -> tuple[Engine, Any, torch.device, Row]:
    """(engine, configuration, device, what its row says). transformers reads files itself where it can, else gets our weights."""
    from granite_kernels.model.sources import RANDOM, open_model, resolve

    from .engines import Ours, Transformers, stored_format, transformers_from
    from .evaluate import theirs
    from .harness import OURS, first_line

    note = "random weights: ours"
    if implementation != OURS and not model.startswith(RANDOM):
        source, on_cpu = resolve(model), str(options["device"]) == "cpu"
        packed = "float32" if on_cpu else "bfloat16"  # what ours computes in then
        kind = (packed if str(source).endswith(".gguf") else "auto") if options["dtype"] == "auto" else options["dtype"]
        try:
            read = theirs(source, kind).to(options["device"])
            engine = Transformers(read, implementation)
            return engine, read.config, read.device, {"format": str(read.dtype).removeprefix("torch.")}
        except Exception as error:  # as of a Granite GGUF
            note = f"reads it not itself, got our weights: {first_line(error)}"
    loaded = open_model(model, **options)
    about: Row = {"format": options.get("quantization") or stored_format(loaded)}
    if implementation == OURS:
        return Ours(loaded), loaded.config, loaded.device, about
    return transformers_from(loaded, implementation), loaded.config, loaded.device, about | {"note": note}
