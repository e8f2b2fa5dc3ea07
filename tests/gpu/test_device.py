"""What only a GPU can show: compiled kernels on real hardware, and the captured step. Run by `make gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from granite_kernels.model import generate as generation
from torch import Tensor

from granite_kernels import GraniteForCausalLM
from granite_kernels.kernels import attention, attention_decode, embed, linear, norm, sample, swiglu
from granite_kernels.reference import attention as reference_attention
from granite_kernels.reference import embed as reference_embed
from granite_kernels.reference import linear as reference_linear
from granite_kernels.reference import norm as reference_norm
from granite_kernels.reference import rope as reference_rope
from granite_kernels.reference import sample as reference_sample
from granite_kernels.reference import swiglu as reference_swiglu
from granite_kernels.testing import assert_accurate
from granite_kernels.weight import Weight
from tests import tiny

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """Eager float32 is what the rule compares with: without tf32."""
    torch.backends.cuda.matmul.allow_tf32 = False


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(DEVICE)


def hold(kernel: Any, specification: Any, *tensors: Any, **keywords: Any) -> None:
    """The accuracy rule, and the same bits twice."""
    wide = [value.double() if isinstance(value, Tensor) and value.is_floating_point() else _widen(value) for value in tensors]
    out = kernel(*tensors, **keywords)
    assert_accurate(out, specification(*wide, **keywords), specification(*tensors, **keywords))
    assert torch.equal(out, kernel(*tensors, **keywords))


def _widen(value: Any) -> Any:
    return Weight.dense(*(part.planes[0].double() for part in value.parts)) if isinstance(value, Weight) else value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 17, 130])
@pytest.mark.parametrize(("hidden", "inner", "vocab"), [(2048, 8192, 49155), (4096, 12800, 1000), (576, 1536, 301)])
def test_matrices(hidden: int, inner: int, vocab: int, tokens: int, dtype: torch.dtype) -> None:
    x, scale_norm = randn(1, tokens, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
    narrow = hidden**-0.5
    square = Weight.dense(randn(hidden, hidden, dtype=dtype, seed=2, scale=narrow))
    hold(linear.linear, reference_linear.linear, x, square)
    hold(linear.linear_add, reference_linear.linear_add, x, square, randn(1, tokens, hidden, dtype=dtype, seed=3), scale=0.22)
    gate_up = Weight.dense(randn(2 * inner, hidden, dtype=dtype, seed=4, scale=narrow))
    hold(linear.norm_gate_up_swiglu, reference_linear.norm_gate_up_swiglu, x, scale_norm, gate_up, eps=1e-5)
    head = Weight.dense(randn(vocab, hidden, dtype=dtype, seed=5, scale=narrow))
    hold(linear.norm_logits, reference_linear.norm_logits, x, scale_norm, head, eps=1e-5, scaling=8.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 16, 40])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 32, 8), (128, 32, 8), (64, 24, 8), (64, 16, 8)])
def test_attention_and_append(head_dim: int, heads: int, kv_heads: int, tokens: int, dtype: torch.dtype) -> None:
    hidden, held = heads * head_dim, 700
    x, scale_norm = randn(1, tokens, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
    weight = Weight.dense(randn((heads + 2 * kv_heads) * head_dim, hidden, dtype=dtype, seed=2, scale=hidden**-0.5))
    lengths = torch.tensor([held], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([11], dtype=torch.int32, device=DEVICE)
    positions = (torch.arange(tokens, device=DEVICE)[None] + held - 11).int()
    table = reference_rope.rotary_table(2048, head_dim, 5e6, dtype=torch.float64, device=DEVICE)
    filled = randn(2, 1, kv_heads, 1024, head_dim, dtype=dtype, seed=3)
    filled[:, :, :, held:] = float("nan")

    def run(norm_qkv: Any, attend: Any, wide: torch.dtype) -> tuple[Tensor, ...]:
        k, v = filled.to(wide).clone()
        q = norm_qkv(x.to(wide), scale_norm.to(wide), _cast(weight, wide), table.to(wide), positions, lengths, k, v, eps=1e-5)
        return q, attend(q, k, v, lengths, starts, scale=1 / head_dim), k[:, :, held : held + tokens], v[:, :, held : held + tokens]

    attend = attention_decode.attention_decode if tokens <= 16 else attention.attention
    ours = run(linear.norm_qkv_rope_append, attend, dtype)
    exact = run(reference_linear.norm_qkv_rope_append, reference_attention.attention, torch.float64)
    eager = run(reference_linear.norm_qkv_rope_append, reference_attention.attention, dtype)
    for actual, wide, plain in zip(ours, exact, eager, strict=True):
        assert_accurate(actual, wide, plain)


def _cast(weight: Weight, dtype: torch.dtype) -> Weight:
    return Weight.dense(*(part.planes[0].to(dtype) for part in weight.parts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1536, 2048, 4096])
def test_rows(hidden: int, dtype: torch.dtype) -> None:
    x, weight = randn(5, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
    hold(norm.rms_norm, reference_norm.rms_norm, x, weight, eps=1e-5)
    hold(swiglu.swiglu, reference_swiglu.swiglu, x)
    table, ids = Weight.dense(randn(49155, hidden, dtype=dtype)), torch.tensor([[0, 49154, 7]], device=DEVICE)
    arguments = (ids, table)
    assert torch.equal(
        embed.embed(*arguments, multiplier=12.0, dtype=dtype), reference_embed.embed(*arguments, multiplier=12.0, dtype=dtype)
    )


@pytest.mark.parametrize("settings", [(0, 0, 1, 1), (1, 0, 1, 1.2), (0.7, 40, 0.9, 1.1)])
def test_sampling(settings: tuple[float, ...]) -> None:
    logits = randn(4, 49155, dtype=torch.bfloat16, scale=3)
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(4, generator=generator).to(DEVICE)
    seen = (torch.rand(4, 49155, generator=generator) < 0.2).to(torch.uint8).to(DEVICE)
    arguments = (logits, uniforms, seen, torch.tensor(settings, dtype=torch.float32, device=DEVICE))
    assert torch.equal(sample.sample(*arguments), reference_sample.sample(*arguments))


@pytest.fixture(scope="module", params=list(tiny.SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    head_dim, heads, kv_heads = tiny.SHAPES[request.param]
    return tiny.save(tiny.make(head_dim=head_dim, heads=heads, kv_heads=kv_heads), tmp_path_factory.mktemp("model"))


def test_graph_replay_equals_the_eager_step_with_inputs_that_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = GraniteForCausalLM.from_pretrained(folder, device="cuda", dtype=torch.bfloat16)
    requests = [(tiny.prompts(2, tokens, seed=tokens), {}) for tokens in (5, 40, 300)]
    requests.append((tiny.prompts(2, 9), {"do_sample": True, "temperature": 0.8, "top_k": 30, "seed": 3}))
    results = [graphed.generate(ids, max_new_tokens=24, eos_token_id=[], **arguments) for ids, arguments in requests]
    assert graphed._captured is not None
    eager = GraniteForCausalLM.from_pretrained(folder, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(GraniteForCausalLM, "_step_function", lambda self, *parts: generation.eager_step(*parts))
    for (ids, arguments), expected in zip(requests, results, strict=True):
        assert torch.equal(eager.generate(ids, max_new_tokens=24, eos_token_id=[], **arguments), expected)


def test_both_backends_give_the_same_tokens(folder: Path) -> None:
    triton, plain = (GraniteForCausalLM.from_pretrained(folder, device="cuda", backend=backend) for backend in ("triton", "torch"))
    assert all(row.active for row in triton.kernels())
    ids = tiny.prompts(3, 33)
    for arguments in ({}, {"do_sample": True, "seed": 7}):
        assert torch.equal(*(model.generate(ids, max_new_tokens=32, **arguments) for model in (triton, plain)))


def test_moving_away_drops_the_graph(folder: Path) -> None:
    model = GraniteForCausalLM.from_pretrained(folder, device="cuda")
    first = model.generate(tiny.prompts(1, 8), max_new_tokens=8)
    assert model.to("cpu").kernels()[0].active is False
    assert torch.equal(model.generate(tiny.prompts(1, 8), max_new_tokens=8), first.cpu())
    assert torch.equal(model.to("cuda").generate(tiny.prompts(1, 8), max_new_tokens=8), first)
