"""The choice of the next token: equal tokens on both backends, transformers' meaning of every setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from granite_kernels.kernels import sample as kernels
from granite_kernels.reference import sample as reference
from tests.traced import run as in_all_orders

SETTINGS = [  # temperature, top_k, top_p, penalty
    (0, 0, 1, 1),
    (0, 0, 1, 1.5),
    (1, 0, 1, 1),
    (0.7, 5, 1, 1),
    (1, 1, 1, 1),
    (1.3, 0, 0.9, 1),
    (1, 50, 0.5, 1.2),
    (1, 0, 1e-6, 1),
    (1, 400, 0.99, 1),
    (2, 300, 0.3, 0.8),
]


def case(settings: tuple[float, ...], *, vocab: int = 301, batch: int = 4, ties: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(int(10 * sum(settings)))
    logits = torch.randn(batch, vocab, generator=generator) * 3
    logits = logits.round() if ties else logits
    seen = (torch.rand(batch, vocab, generator=generator) < 0.3).to(torch.uint8)
    return logits.to(dtype), torch.rand(batch, generator=generator), seen, torch.tensor(settings, dtype=torch.float32)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_equal_the_reference(settings: tuple[float, ...], ties: bool) -> None:
    arguments = case(settings, ties=ties)
    assert torch.equal(kernels.sample(*arguments), reference.sample(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [49155, 128256])
def test_large_vocabularies_and_halves(vocab: int, dtype: torch.dtype) -> None:
    for settings in ((0, 0, 1, 1), (1, 0, 1, 1.1)):
        arguments = case(settings, vocab=vocab, batch=2, dtype=dtype)
        assert torch.equal(kernels.sample(*arguments), reference.sample(*arguments))


def test_ties_go_to_the_lower_id_and_the_last_id_can_win() -> None:
    logits = torch.zeros(3, 20000)
    logits[1, [7, 15000]] = 2.0
    logits[2, 19999] = 1.0
    seen, greedy = torch.zeros(3, 20000, dtype=torch.uint8), torch.tensor([0.0, 0, 1, 1])
    assert kernels.sample(logits, torch.zeros(3), seen, greedy).tolist() == [0, 7, 19999]


def test_nan_neither_hangs_nor_strays() -> None:
    logits = torch.full((2, 301), float("nan"))
    logits[1, 5] = 1.0
    seen = torch.zeros(2, 301, dtype=torch.uint8)
    for settings in ((0.0, 0, 1, 1), (1.0, 10, 0.9, 1)):
        chosen = kernels.sample(logits, torch.tensor([0.5, 0.5]), seen, torch.tensor(settings))
        assert 0 <= int(chosen[0]) < 301
        assert int(chosen[1]) == 5


def test_settings_mean_what_they_mean_in_transformers() -> None:
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits, _, _, _ = case((1, 0, 1, 1), batch=2)
    said = torch.randint(0, 301, (2, 40), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(2, 301, dtype=torch.uint8).scatter_(1, said, 1)
    steps = [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.8), TopKLogitsWarper(60), TopPLogitsWarper(0.7)]
    expected = LogitsProcessorList(steps)(said, logits.clone()).softmax(-1)
    sampling = torch.tensor([0.8, 60, 0.7, 1.3])
    grid = (torch.arange(400) + 0.5) / 400
    drawn = torch.stack([reference.sample(logits, u.expand(2), seen, sampling) for u in grid], dim=1)
    for row in range(2):
        frequencies = torch.bincount(drawn[row], minlength=301) / 400
        assert (frequencies - expected[row]).abs().max() < 1 / 400 + 1e-4


def test_a_step_moves_the_state_of_its_own_row_only() -> None:
    logits, _, seen, sampling = case((0.9, 20, 0.9, 1.1))
    uniforms = torch.rand(8, 4, generator=torch.Generator().manual_seed(5))

    def run(op: Any) -> tuple[torch.Tensor, ...]:
        state = [torch.full((4, 1), -1), torch.tensor([[3], [4], [5], [6]]).int(), torch.tensor([3, 9, 5, 6]).int()]
        steps, tokens, marked = torch.tensor([0, 2, 7, 1]).int(), torch.full((4, 8), -1), seen.clone()
        op(logits, uniforms, marked, sampling, *state, steps, tokens)
        return (*state, steps, tokens, marked)

    result, _ = in_all_orders(lambda: run(kernels.sample_step))
    expected = run(reference.sample_step)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    ids, positions, lengths, steps, tokens, marked = result
    assert positions.flatten().tolist() == [4, 5, 6, 7]
    assert lengths.tolist() == [4, 10, 6, 7]
    assert steps.tolist() == [1, 3, 8, 2]
    assert (tokens >= 0).sum() == 4
    assert all(marked[row, ids[row, 0]] == 1 for row in range(4))


def test_torch_sees_through_the_operations() -> None:
    arguments = case((0.7, 5, 0.9, 1.1))
    torch.library.opcheck(torch.ops.granite_kernels.sample.default, arguments)
