"""The whole model on Triton's kernels, in the interpreter: against transformers, and against plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from granite_kernels import GraniteForCausalLM, launch
from granite_kernels.errors import GraniteError
from granite_kernels.launch import DecodeLaunch, MatrixLaunch, Target
from granite_kernels.linear import launches, rows
from granite_kernels.ops import choose
from tests import tiny
from tests.test_demo import demo, gguf  # noqa: F401  (fixtures)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program costs the interpreter some ten milliseconds, whatever its size: two multiprocessors are enough to fill."""
    monkeypatch.setattr(launch, "INTERPRETED", Target(arch=90, sms=2))


@pytest.fixture
def large_tiles(few_programs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that no GPU would take, for a model of real size."""

    def shape(rows: int, columns: int, tokens: int, target: Target, format: str) -> MatrixLaunch:
        return MatrixLaunch(groups=64 if rows > 2048 else 16, warps=16, splits=1, tokens=8 if tokens <= 8 else 16)

    monkeypatch.setattr(launches, "matrix_launch", shape)
    monkeypatch.setattr(rows, "decode_launch", lambda *, gather: DecodeLaunch(1 if gather else 4096, 2, 4))


@pytest.fixture(scope="module", params=list(tiny.SHAPES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    head_dim, heads, kv_heads = tiny.SHAPES[request.param]
    theirs = tiny.make(head_dim=head_dim, heads=heads, kv_heads=kv_heads)
    return theirs, tiny.save(theirs, tmp_path_factory.mktemp("triton"))


def test_logits_and_tokens_equal_transformers(pair: tuple[Any, Path], large_tiles: None) -> None:
    theirs, folder = pair
    ours = GraniteForCausalLM.from_pretrained(folder, device="cpu", backend="triton")
    assert all(row.active for row in ours.kernels())
    for tokens in (21, 5):  # composed, and the kernels of a decode step
        ids = tiny.prompts(2, tokens)
        mask = torch.ones_like(ids)
        ids[1, :2], mask[1, :2] = 0, 0
        with torch.no_grad():
            expected = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
            found = ours(ids, attention_mask=mask).logits
        assert tiny.spread_error(found[mask.bool()], expected[mask.bool()]) < 1e-4
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=[]), expected)


def test_sampled_tokens_are_the_same_on_both_backends(pair: tuple[Any, Path], large_tiles: None) -> None:
    triton, plain = (GraniteForCausalLM.from_pretrained(pair[1], device="cpu", backend=backend) for backend in ("triton", "torch"))
    arguments = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 11}
    ids = tiny.prompts(2, 18)
    assert torch.equal(*(model.generate(ids, max_new_tokens=5, **arguments) for model in (triton, plain)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_no_worse_than_plain_pytorch(pair: tuple[Any, Path], dtype: torch.dtype, few_programs: None) -> None:
    theirs, folder = pair
    ids = tiny.prompts(1, 6)
    triton, plain = (
        GraniteForCausalLM.from_pretrained(folder, device="cpu", dtype=dtype, backend=backend) for backend in ("triton", "torch")
    )
    with torch.no_grad():
        exact = theirs(ids).logits.double()
    error, allowed = ((model(ids).logits.double() - exact).pow(2).mean().sqrt().item() for model in (triton, plain))
    assert error <= 1.1 * allowed


@pytest.mark.slow
def test_the_demo_begins_as_in_plain_pytorch(demo: GraniteForCausalLM, gguf: Path, large_tiles: None) -> None:  # noqa: F811
    """Eight greedy tokens of packed weights, Q4_1 and Q8_0, against their dequantized twin's: the first from the prompt, the others
    from one step over the seven before them.

    A step takes the interpreter ten seconds. Where the largest logit behind each of plain PyTorch's tokens is its next token, the
    greedy tokens are the same, by induction.
    """
    assert demo.tokenizer is not None
    ids = torch.tensor([demo.tokenizer.encode("Water boils at a temperature of")])
    expected = demo.generate(ids, max_new_tokens=8, eos_token_id=[])[:, ids.shape[1] :]
    triton = GraniteForCausalLM.from_pretrained(gguf, device="cpu", backend="triton")
    prompt = triton(ids, logits_to_keep=1)
    assert triton.weights.embed.formats == ("q8_0",)
    step = triton(expected[:, :7], past_key_values=prompt.past_key_values)
    assert torch.equal(torch.cat((prompt.logits, step.logits), 1).argmax(-1), expected)


def test_the_backend_is_honoured_or_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make("granitemoe", kv_heads=2), tmp_path)
    assert all(row.active for row in GraniteForCausalLM.from_pretrained(folder, device="cpu", backend="triton").kernels())
    assert GraniteForCausalLM.from_pretrained(folder, device="cpu").kernels()[0].active is False
    with pytest.raises(GraniteError, match=r"backend 'triton' can't be honoured: kernels take float32, .* not torch\.float64"):
        choose("triton", torch.device("cpu"), torch.float64)
