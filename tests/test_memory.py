"""What a token reads of the weights: the chosen experts, and of an embedding that isn't the head a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from granite_kernels.bench.offline.steps import stand_in
from granite_kernels.model.cli import main
from granite_kernels.model.memory import measure

from granite_kernels import GraniteConfig, GraniteForCausalLM
from tests import tiny, tiny_gguf

ACTIVE = {"3.1-1b-a400m": 428_658_688, "3.1-3b-a800m": 882_874_368}  # parameters


@pytest.mark.parametrize("preset", ACTIVE)
def test_the_real_sizes(preset: str) -> None:
    config = GraniteConfig.preset(preset)
    found = measure(stand_in(config), top_k=config.num_experts_per_tok)
    assert config.active_parameters() == ACTIVE[preset]
    assert (found.weights, found.active) == (2 * config.parameters(), 2 * ACTIVE[preset])
    assert f"{2 * ACTIVE[preset]:,} bytes" in str(found)


@pytest.mark.parametrize(("kind", "tied"), [("granite", True), ("granite", False), ("granitemoeshared", False)])
def test_models_of_every_kind(kind: str, tied: bool) -> None:
    shared = {"shared_intermediate_size": 96} if kind == "granitemoeshared" else {}
    sizes = tiny.moe_config(**shared) if shared else tiny.granite_config()
    config = GraniteConfig.from_dict({**sizes, "model_type": kind, "tie_word_embeddings": tied, "torch_dtype": "float32"})
    memory = GraniteForCausalLM.from_config(config, device="cpu").memory()
    rows = 0 if tied else config.vocab_size - 1
    assert memory.active == 4 * (config.active_parameters() - rows * config.hidden_size)
    assert memory.total == memory.weights + memory.cache + memory.workspace


def test_packed_experts_and_what_inspect_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three eighths of experts in two formats; all else in a third."""
    theirs = tiny.make("granitemoe", intermediate_size=256, num_experts_per_tok=3)
    file = tmp_path / "tiny.gguf"
    tiny_gguf.write(theirs, file, "Q8_0", {"ffn_down_exps": "Q6_K", "_exps": "Q4_K"})
    ours = GraniteForCausalLM.from_pretrained(file, device="cpu", backend="torch", dtype=torch.float32)
    memory = ours.memory()
    experts = sum(layer.experts.gate_up.nbytes + layer.experts.down.nbytes for layer in ours.weights.layers)
    assert memory.weights - memory.active == experts * 5 // 8
    with pytest.raises(SystemExit):
        main(["inspect", str(file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["active_parameters"] == ours.config.active_parameters()
    values = 2 * 8 * 256 * 256  # of both layers' gate, up or down
    assert found["bytes"] - found["active_bytes"] == (values * 2 * 144 + values * 210) // 256 * 5 // 8
