"""Mixtures of experts from GGUF: packed, on both backends, against transformers' model of the same dequantized values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_kernels import GraniteForCausalLM, formats
from tests import experts_launches, tiny, tiny_gguf, tiny_hf

NAMES = ["F16", "BF16", *(name.upper() for name in formats.GGUF_NAMES)]
TYPES = [name if name in ("Q8_0", "Q4_K") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
PROMPT = 17  # tokens: more than a step takes


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hf.large_tiles(monkeypatch)
    experts_launches.large_tiles(monkeypatch)


def write(path: Path, kind: str, kinds: dict[str, str] | None = None, model: str = "granitemoe", **config: Any) -> tuple[Path, Tensor]:
    """A file of a tiny mixture, and the logits of its dequantized values for `ids()`."""
    sizes = {"intermediate_size": 256, "num_local_experts": 4, "num_hidden_layers": 1, **config}
    theirs = tiny.make(model, heads=4, kv_heads=2, **sizes)
    values = tiny_gguf.write(theirs, path / "tiny.gguf", kind, kinds)
    theirs.load_state_dict({**theirs.state_dict(), **values, "lm_head.weight": values["model.embed_tokens.weight"]})
    with torch.no_grad():
        return path / "tiny.gguf", theirs(ids()).logits


def ids() -> Tensor:
    return tiny.prompts(1, PROMPT + 1)


def check(path: Path, expected: Tensor, backend: str, gate_up: str, down: str) -> None:
    """The logits of a prompt, and of a step behind it."""
    ours = GraniteForCausalLM.from_pretrained(path, device="cpu", dtype=torch.float32, backend=backend)
    for layer in ours.weights.layers:
        assert (*layer.experts.gate_up.formats, *layer.experts.down.formats) == (gate_up, down)
        assert layer.experts.router.dtype == torch.float32
    prompt = ours(ids()[:, :PROMPT])
    step = ours(ids()[:, PROMPT:], past_key_values=prompt.past_key_values)
    assert tiny.spread_error(torch.cat((prompt.logits, step.logits), 1), expected) < 1e-3


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind: str, tmp_path: Path) -> None:
    path, expected = write(tmp_path, kind)
    held = "dense" if kind in ("F16", "BF16") else kind.lower()
    for backend in ("torch", "triton"):
        check(path, expected, backend, held, held)


def test_a_mix_of_types(tmp_path: Path) -> None:
    """As Q4_K_M: down, v and the embedding in Q6_K."""
    path, expected = write(tmp_path, "Q4_K", tiny_gguf.Q4_K_M, num_hidden_layers=2)
    for backend in ("torch", "triton"):
        check(path, expected, backend, "q4_k", "q6_k")


def test_gate_and_up_of_two_types_become_dense(tmp_path: Path) -> None:
    path, expected = write(tmp_path, "Q8_0", {"ffn_up_exps": "Q4_0"})
    check(path, expected, "torch", "dense", "q8_0")


def test_a_shared_expert(tmp_path: Path) -> None:
    path, expected = write(tmp_path, "Q4_K", {"ffn_up_shexp": "Q6_K"}, "granitemoeshared", shared_intermediate_size=512)
    for backend in ("torch", "triton"):
        check(path, expected, backend, "q4_k", "q4_k")
