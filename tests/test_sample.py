"""The choice of the next token: equal tokens on both backends, transformers' meaning of every setting, and what a bad row may not do."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.kernels import sample as kernels
from granite_kernels.kernels.sample import sample, sample_step
from granite_kernels.reference import sample as reference
from tests.traced import Guarded, cost, run, same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GREEDY = [0.0, 0.0, 1.0, 1.0]
LANES = kernels.BLOCK // 2


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(batch: int, vocab: int, dtype: torch.dtype = FP32, *, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """logits, uniforms, seen; with `ties` a logit is one of some thirty values."""
    logits = torch.randn(batch, vocab) * 3
    logits = logits.mul_(2).round_().div_(2) if ties else logits
    return logits.to(dtype), torch.rand(batch), (torch.rand(batch, vocab) < 0.3).to(torch.uint8)


def settings(temperature: float = 1.0, top_k: float = 0.0, top_p: float = 1.0, penalty: float = 1.0) -> Tensor:
    return torch.tensor([temperature, top_k, top_p, penalty])


TEMPERATURES, TOP_K, TOP_P, PENALTIES = (0.0, 0.3, 1.0, 2.5), (0, 1, 5, 40, 299, 300, 1000), (1.0, 0.999, 0.9, 0.3, 1e-6), (1.0, 1.3, 0.7)
GRID = list(itertools.product(TEMPERATURES, TOP_K, TOP_P, PENALTIES))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_references_tokens(dtype: torch.dtype, ties: bool) -> None:
    number = 2 * (FP32, BF16, FP16).index(dtype) + ties
    for temperature, top_k, top_p, penalty in GRID[number::41]:  # coprime to the lengths of the ranges, so that all values mix
        logits, uniforms, seen = inputs(2, 300, dtype, ties=ties)
        sampling = settings(temperature, top_k, top_p, penalty)
        expected = reference.sample(logits, uniforms, seen, sampling)
        assert torch.equal(sample(logits, uniforms, seen, sampling), expected), sampling.tolist()


@pytest.mark.parametrize(("vocab", "dtype"), [(49155, BF16), (49152, FP32), (128256, BF16)])
@pytest.mark.parametrize("sampling", [GREEDY, [0.7, 50, 0.9, 1.2]], ids=["greedy", "filtered"])
def test_real_vocabularies(vocab: int, dtype: torch.dtype, sampling: list[float]) -> None:
    logits, uniforms, seen = inputs(2, vocab, dtype)
    logits[0, 0], logits[1, -1] = 20, 20  # the first column, and the last one of an odd row
    expected = reference.sample(logits, uniforms, seen, torch.tensor(sampling))
    assert torch.equal(sample(logits, uniforms, seen, torch.tensor(sampling)), expected)
    if sampling == GREEDY:
        assert expected.tolist() == [0, vocab - 1]


def test_draws_from_a_real_vocabulary() -> None:
    logits, _, seen = inputs(1, 49155)
    uniforms = torch.tensor([0.0, 0.3, 0.77, 1 - 2**-24])
    rows, seen = logits.expand(4, -1).contiguous(), seen.repeat(4, 1)
    sampling = settings(top_p=0.95)
    assert torch.equal(sample(rows, uniforms, seen, sampling), reference.sample(rows, uniforms, seen, sampling))


@pytest.mark.parametrize("sampling", [(1, 3, 0.9), (1, 60, 1.0), (1, 5000, 0.8), (1, 0, 0.5), (0.5, 0, 0.999), (3, 0, 0.2)])
@pytest.mark.parametrize("case", ["one lane", "equal", "two values"])
def test_the_first_cut_takes_nothing_that_stays(case: str, sampling: tuple[float, float, float]) -> None:
    """What a first cut goes by, the largest of the tokens of a lane, says least where all large ones share a lane."""
    logits, _, _ = inputs(1, 20000)
    if case == "one lane":
        logits[0, 7::LANES] += 12
    else:
        logits = torch.zeros(1, 20000) if case == "equal" else (torch.rand(1, 20000) < 0.3).float()
    rows, uniforms = logits.repeat(3, 1), torch.tensor([400.5, 10200.5, 19800.5]) / 20000  # between two of equal tokens
    seen = torch.zeros(rows.shape, dtype=torch.uint8)
    expected = reference.sample(rows.double(), uniforms, seen, settings(*sampling))
    assert torch.equal(sample(rows, uniforms, seen, settings(*sampling)), expected)


def test_a_filter_reads_the_keys_few_times() -> None:
    logits, uniforms, seen = inputs(1, 49155)
    for sampling in (settings(top_k=50), settings(top_k=50, top_p=0.9), settings(0.5, top_p=0.9)):
        _, (launch,) = run(lambda sampling=sampling: [sample(logits, uniforms, seen, sampling)], ("forward",))
        assert 32 * launch["keys_ptr"].requests["read"] < 4 * 4 * 49155


@pytest.mark.parametrize("sampling", [GREEDY, [0.7, 0, 1, 1], [1, 20, 0.8, 1.1]], ids=["greedy", "drawn", "filtered"])
def test_order_and_traffic(sampling: list[float]) -> None:
    logits, uniforms, seen = inputs(3, 8200)
    guarded = Guarded(logits), Guarded(uniforms), Guarded(seen), Guarded(torch.tensor(sampling))
    (tokens,), (launch,) = run(lambda: [sample(*(g.tensor for g in guarded))])
    assert torch.equal(tokens, reference.sample(logits, uniforms, seen, torch.tensor(sampling)))
    assert launch.grid == (3, 1, 1)
    if sampling == GREEDY:
        assert launch["keys_ptr"].written_bytes == 0
    for tensor in guarded:
        tensor.check()


def test_equal_logits_stay_together() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0, -1.0]]).repeat(9, 1)
    seen = torch.zeros(logits.shape, dtype=torch.uint8)
    uniforms = torch.linspace(0, 1 - 2**-24, 9)
    for sampling in (settings(top_k=1), settings(top_k=2), settings(top_k=3), settings(top_p=0.1), settings(top_p=0.5)):
        assert sample(logits, uniforms, seen, sampling).unique().tolist() == [1, 2, 3]
        assert reference.sample(logits, uniforms, seen, sampling).unique().tolist() == [1, 2, 3]
    assert sample(logits, uniforms, seen, settings(top_k=4)).unique().tolist() == [1, 2, 3, 4]


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(4, 20000)
    logits[1, [7, 15000]] = 2.0
    logits[2, 19999] = 1.0
    logits[3, 0:19999:2] = -0.0  # equals 0
    seen = torch.zeros(4, 20000, dtype=torch.uint8)
    assert sample(logits, torch.zeros(4), seen, torch.tensor(GREEDY)).tolist() == [0, 7, 19999, 0]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]]).log().repeat(20, 1)
    tokens = sample(logits, (torch.arange(20) + 0.5) / 20, torch.zeros(20, 5, dtype=torch.uint8), settings())
    assert tokens.bincount(minlength=5).tolist() == [2, 8, 1, 5, 4]


def test_settings_mean_what_they_mean_in_transformers() -> None:
    from transformers.generation import logits_process as theirs

    logits, _, _ = inputs(2, 301)
    said = torch.randint(0, 301, (2, 40))
    seen = torch.zeros(2, 301, dtype=torch.uint8).scatter_(1, said, 1)
    scores = theirs.RepetitionPenaltyLogitsProcessor(1.3)(said, logits.clone())
    for warp in (theirs.TemperatureLogitsWarper(0.8), theirs.TopKLogitsWarper(60), theirs.TopPLogitsWarper(0.7)):
        scores = warp(said, scores)
    expected = scores.softmax(-1)
    grid = (torch.arange(400) + 0.5) / 400
    drawn = torch.stack([reference.sample(logits, u.expand(2), seen, settings(0.8, 60, 0.7, 1.3)) for u in grid], dim=1)
    for row in range(2):
        frequencies = torch.bincount(drawn[row], minlength=301) / 400
        assert (frequencies - expected[row]).abs().max() < 1 / 400 + 1e-4


def test_the_penalty_divides_what_is_positive_and_multiplies_what_is_not() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0], [-2.0, -1.5, -4.0]])
    seen = torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.uint8)
    assert sample(logits, torch.zeros(2), seen, settings(0.0, penalty=1.5)).tolist() == [1, 0]
    assert sample(logits, torch.zeros(2), seen, settings(0.0, penalty=1.25)).tolist() == [0, 1]


SPOILT = {
    "NaN": [float("nan")] * 7,
    "some NaN": [0.0, float("nan"), 1.0, float("nan"), 2.0, 0.5, float("nan")],
    "-inf": [float("-inf")] * 7,
    "all but one -inf": [float("-inf")] * 4 + [-50.0] + [float("-inf")] * 2,
    "inf": [0.0, float("inf"), 1.0, float("inf"), 2.0, 0.5, float("nan")],
    "huge": [3e38, -3e38, 3e38, 0.0, 1.0, 2.0, 3.0],
}


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_row_yields_a_token_and_spoils_no_other(name: str) -> None:
    good, uniforms, seen = inputs(2, 7)
    bad = good.clone()
    bad[1] = torch.tensor(SPOILT[name])
    for sampling in (torch.tensor(GREEDY), settings(), settings(0.5, 3, 0.5, 1.3)):
        (tokens,), _ = run(lambda sampling=sampling: [sample(bad, uniforms, seen, sampling)], ("forward",))
        assert 0 <= tokens[1] < 7
        assert same_bits(tokens[:1], sample(good[:1], uniforms[:1], seen[:1], sampling))
    if name == "all but one -inf":
        assert sample(bad, uniforms, seen, settings())[1] == 4


def test_a_uniform_of_nan_yields_a_token() -> None:
    logits, _, seen = inputs(1, 7)
    assert 0 <= sample(logits, torch.tensor([float("nan")]), seen, settings()).item() < 7


def test_a_row_does_not_depend_on_the_others() -> None:
    logits, uniforms, seen = inputs(5, 300)
    whole = sample(logits, uniforms, seen, settings(0.8, 30, 0.9, 1.1))
    for batch in (1, 3):
        assert torch.equal(sample(logits[:batch], uniforms[:batch], seen[:batch], settings(0.8, 30, 0.9, 1.1)), whole[:batch])


def state(batch: int, vocab: int, capacity: int) -> dict[str, Tensor]:
    return dict(
        seen=(torch.rand(batch, vocab) < 0.1).to(torch.uint8),
        ids=torch.full((batch, 1), -1),
        positions=torch.randint(0, 99, (batch, 1), dtype=torch.int32),
        lengths=torch.randint(0, 99, (batch,), dtype=torch.int32),
        steps=torch.randint(0, capacity, (batch,), dtype=torch.int32),
        tokens=torch.full((batch, capacity), -1),
    )


@pytest.mark.parametrize("sampling", [GREEDY, [0.7, 50, 0.9, 1.2]], ids=["greedy", "filtered"])
def test_a_step_moves_its_own_row(sampling: list[float]) -> None:
    logits, uniforms, before = inputs(4, 301)[0], torch.rand(6, 4), state(4, 301, 6)

    def step(op: Callable[..., None]) -> list[Tensor]:
        guarded = {name: Guarded(tensor) for name, tensor in before.items()}
        op(logits, uniforms, sampling=torch.tensor(sampling), **{name: g.tensor for name, g in guarded.items()})
        for tensor in guarded.values():
            tensor.check()
        return [g.tensor for g in guarded.values()]

    after, _ = run(lambda: step(sample_step))
    for name, actual, expected in zip(before, after, step(reference.sample_step), strict=True):
        assert same_bits(actual, expected), name


def test_steps_behind_the_end_write_no_token() -> None:
    logits, uniforms, before = inputs(2, 50)[0], torch.rand(6, 2), state(2, 50, 6)
    before["steps"] = torch.tensor([6, 2], dtype=torch.int32)
    guarded = Guarded(before["tokens"])

    def step() -> list[Tensor]:
        sample_step(logits, uniforms, sampling=settings(), **{**before, "tokens": guarded.tensor})
        return []

    run(step, ("forward",))
    assert (guarded.tensor != -1).nonzero().tolist() == [[1, 2]]
    guarded.check()


def test_the_cost_of_a_greedy_token_is_its_logits() -> None:
    logits, uniforms, seen = inputs(1, 8192, BF16)
    _, (launch,) = run(lambda: [sample(logits, uniforms, seen, torch.tensor(GREEDY))], ("forward",))
    assert cost(kernels, launch, {"logits_ptr": logits, "vocab": 8192})["bytes"] == launch["logits_ptr"].read_bytes == logits.nbytes


def test_torch_sees_through_them() -> None:
    logits, uniforms, seen = inputs(1, 50)
    torch.library.opcheck(torch.ops.granite_kernels.sample.default, (logits, uniforms, seen, torch.tensor(GREEDY)))
    arguments = {"sampling": torch.tensor(GREEDY), **state(1, 50, 6)}
    torch.library.opcheck(torch.ops.granite_kernels.sample_step.default, (logits, torch.rand(6, 1)), arguments)


def test_what_does_not_fit_is_refused() -> None:
    logits, uniforms, seen = inputs(2, 50)
    with pytest.raises(GraniteError, match=r"expected \(2,\), \(2, 50\) and \(4,\)"):
        sample(logits, uniforms[:1], seen, settings())
    with pytest.raises(GraniteError, match=r"torch.float64: expected float32"):
        sample(logits.double(), uniforms, seen, settings())
    with pytest.raises(GraniteError, match=r"torch.float32, torch.uint8, torch.int64: expected float32, uint8, float32"):
        sample(logits, uniforms, seen, torch.tensor([1, 0, 1, 1]))
    with pytest.raises(GraniteError, match="positions, lengths and steps int32"):
        sample_step(logits, torch.rand(6, 2), sampling=settings(), **{**state(2, 50, 6), "steps": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(GraniteError, match="must be contiguous"):
        sample(logits.T.contiguous().T, uniforms, seen, settings())
    for name, tensor in {"ids": torch.zeros(2, dtype=torch.int64), "tokens": torch.zeros(2, 5, dtype=torch.int64)}.items():
        with pytest.raises(GraniteError, match="a column for each of 6 uniforms"):
            sample_step(logits, torch.rand(6, 2), sampling=settings(), **{**state(2, 50, 6), name: tensor})
