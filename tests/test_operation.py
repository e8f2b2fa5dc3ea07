"""Which way a kernel's operation goes: its body at once, or through the dispatcher for those who listen there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from granite_kernels.operation import operation

went: list[str] = []


@operation("granite_kernels::tripled", mutates_args=())
def tripled(x: Tensor, factor: float) -> Tensor:
    went.append("body")
    return 3 * factor * x


@tripled.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    went.append("fake")
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def nowhere() -> None:
    went.clear()


def dispatched(profiler: torch.profiler.profile) -> bool:
    return "granite_kernels::tripled" in {event.key for event in profiler.key_averages()}


def test_the_body_runs_at_once_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tripled, "registered", lambda *_: pytest.fail("the dispatcher was asked"))
    with torch.no_grad():
        for x in (torch.ones(2), torch.nn.Parameter(torch.ones(2))):
            assert torch.equal(tripled(x, 2.0), torch.full((2,), 6.0))


def test_a_gradient_is_refused_as_for_every_operation_without_one() -> None:
    out = tripled(torch.ones(2, requires_grad=True), 1.0)
    with pytest.raises(RuntimeError, match="register_autograd"):
        out.sum().backward()


def test_compilers_fakes_and_profilers_see_the_operation() -> None:
    with torch.no_grad():
        compiled = torch.compile(lambda x: tripled(x, 1.0) + 1, backend="eager", fullgraph=True)
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 4.0))
        assert "fake" in went
        went.clear()
        with FakeTensorMode():
            assert tripled(torch.empty(5), 1.0).shape == (5,)
        assert went == ["fake"]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            tripled(torch.ones(2), 1.0)
    assert dispatched(profiler)
