"""Models whose weights stay packed: on Triton in the interpreter and in plain PyTorch, against their dequantized twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from granite_kernels.bench.offline.steps import Blank
from granite_kernels.model import quantization as held
from granite_kernels.model.checkpoint.random import RandomCheckpoint
from granite_kernels.model.memory import measure
from granite_kernels.model.weights import load_weights

from granite_kernels import GraniteConfig, GraniteForCausalLM, formats, launch
from granite_kernels.launch import Target
from tests import tiny, tiny_gguf
from tests.test_demo import NEW_TOKENS, PROMPTS, demo, gguf  # noqa: F401  (fixtures)

TYPES = [name.upper() for name in formats.GGUF_NAMES]


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program costs the interpreter some ten milliseconds, whatever its size: two multiprocessors are enough to fill."""
    monkeypatch.setattr(launch, "INTERPRETED", Target(arch=90, sms=2))


def write(path: Path, kind: str, kinds: dict[str, str] | None = None) -> Path:
    model = tiny.make(heads=4, kv_heads=2, intermediate_size=256, num_hidden_layers=1)
    tiny_gguf.write(model, path / "tiny.gguf", kind, kinds)
    return path / "tiny.gguf"


def load(path: Path, backend: str, dtype: torch.dtype = torch.float32) -> GraniteForCausalLM:
    return GraniteForCausalLM.from_pretrained(path, device="cpu", dtype=dtype, backend=backend)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_on_triton(kind: str, tmp_path: Path, few_programs: None) -> None:
    path, ids = write(tmp_path, kind), tiny.prompts(1, 3)
    packed, twin = load(path, "triton"), load(path, "auto")
    (layer,) = packed.weights.layers
    assert layer.qkv.formats == layer.gate_up.formats == packed.weights.embed.formats == (kind.lower(),)
    assert packed.weights.head is packed.weights.embed
    assert twin.weights.embed.formats == ("dense",)
    assert tiny.spread_error(packed(ids).logits, twin(ids).logits) < 1e-3


def test_a_mix_of_types(tmp_path: Path, few_programs: None) -> None:
    """As Q4_K_M: inside one q|k|v, too. A prompt, which is decoded once in float32, and a step; and plain PyTorch on packed weights."""
    path = write(tmp_path, "Q4_K", tiny_gguf.Q4_K_M)
    twin, ids = load(path, "auto"), tiny.prompts(1, 20)
    for backend in ("triton", "torch"):
        packed = load(path, backend)
        (layer,) = packed.weights.layers
        assert layer.qkv.formats == ("q4_k", "q6_k")
        assert packed.memory().bits_per_weight < 7
        assert tiny.spread_error(packed(ids).logits, twin(ids).logits) < 1e-3
        assert torch.equal(packed.generate(ids, max_new_tokens=3, eos_token_id=[]), twin.generate(ids, max_new_tokens=3, eos_token_id=[]))


def test_a_mix_in_bfloat16_is_no_worse_than_decoded_beforehand(tmp_path: Path, few_programs: None) -> None:
    """A prompt that goes through the tiled product, and a step of three tokens."""
    path = write(tmp_path, "Q4_K", tiny_gguf.Q4_K_M)
    exact, packed, plain = load(path, "auto"), load(path, "triton", torch.bfloat16), load(path, "auto", torch.bfloat16)
    for tokens in (20, 3):
        ids = tiny.prompts(1, tokens)
        expected = exact(ids).logits.double()
        error, allowed = ((model(ids).logits.double() - expected).pow(2).mean().sqrt().item() for model in (packed, plain))
        assert error <= 1.1 * allowed


def test_a_cpu_without_room_keeps_them_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "Q6_K")
    assert load(path, "auto").weights.embed.formats == ("dense",)
    monkeypatch.setattr(held, "fits", lambda need, device: need < 1_000_000)
    assert load(path, "auto").weights.embed.formats == ("q6_k",)


@pytest.mark.parametrize(("quantization", "limit"), [("q4_k_m", 1.60e9), ("q6_k", 2.10e9), ("q8_0", 2.72e9), ("int4", 1.36e9)])
def test_memory_of_2b(quantization: str, limit: float) -> None:
    """What memory() says of 2B's layers, fused and in planes, in the mixes that quantizing and llama.cpp's files have."""
    config, meta = GraniteConfig.preset("3.1-2b"), torch.device("meta")
    checkpoint = RandomCheckpoint(config, seed=0, dtype=torch.bfloat16, device=torch.device("cpu"))
    chosen = held.plan(checkpoint.tensors, config.num_hidden_layers, quantization, "2b")
    weights = load_weights(Blank(checkpoint, torch.bfloat16, meta, formats=chosen), config)
    memory = measure(weights, cache=0, workspace=0)
    assert 0.97 * limit < memory.weights <= limit
    assert memory.bits_per_weight == pytest.approx(8 * memory.weights / config.parameters())


@pytest.mark.slow
def test_the_demo_packed_in_plain_pytorch(demo: GraniteForCausalLM, gguf: Path) -> None:  # noqa: F811
    """Q4_1 with an embedding in Q8_0: the 48 greedy tokens of the dequantized twin."""
    assert demo.tokenizer is not None
    ids = torch.tensor([demo.tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[1]}], tokenize=True)])
    packed = GraniteForCausalLM.from_pretrained(gguf, device="cpu", backend="torch")
    assert packed.memory().weights < 0.1e9 < 0.5e9 < demo.memory().weights
    expected = demo.generate(ids, max_new_tokens=NEW_TOKENS, eos_token_id=[])
    assert torch.equal(packed.generate(ids, max_new_tokens=NEW_TOKENS, eos_token_id=[]), expected)
