"""The experts of a mixture, in a step and in a prompt: interpreted and traced, with the block sizes that a GPU would get."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from granite_kernels.bench.offline.traffic import Launch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.kernels import moe as kernels
from granite_kernels.linear import experts, experts_operations, grouped
from granite_kernels.reference import moe as reference
from granite_kernels.testing import assert_accurate
from granite_kernels.workspace import Workspace
from tests.experts_cases import CHOOSING, NAMES, Call, make
from tests.traced import ORDERS, Guarded, cost, run, same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def verify(call: Call, orders: tuple[str, ...] = ORDERS[:1]) -> tuple[Tensor, Sequence[Launch]]:
    """The accuracy rule, guarded inputs, the traced orders. Returns the result and the launches."""
    guarded = {name: Guarded(tensor) for name, tensor in call.tensors.items()}
    traced = dataclasses.replace(call, tensors={name: guard.tensor for name, guard in guarded.items()})
    (actual,), launches = run(lambda: [traced.on(kernels)], orders)
    for name, guard in guarded.items():
        guard.check()
        assert same_bits(guard.tensor, call.tensors[name]), f"{name} was changed"
    assert_accurate(actual, call.on(reference, torch.float64), call.on(reference))
    return actual, launches


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("tokens", [*range(1, 18), 33, 65])
@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_tokens(name: str, tokens: int) -> None:
    verify(make(name, tokens, experts=4, hidden=16, inner=8))


@pytest.mark.parametrize("tokens", [1, 3, 16, 20])
@pytest.mark.parametrize("name", NAMES)
def test_every_order_of_programs(name: str, tokens: int) -> None:
    """The order in which programs finish, of which the last one adds up, changes no bit."""
    verify(make(name, tokens, experts=4), ORDERS)


@pytest.mark.parametrize("choosing", CHOOSING)
@pytest.mark.parametrize("tokens", [3, 16, 40])
@pytest.mark.parametrize("name", NAMES)
def test_who_chooses_whom(name: str, tokens: int, choosing: str) -> None:
    verify(make(name, tokens, experts=6, top_k=3, choosing=choosing))


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("tokens", [1, 5, 13, 18])
@pytest.mark.parametrize("name", NAMES)
def test_every_dtype(name: str, tokens: int, dtype: torch.dtype) -> None:
    verify(make(name, tokens, dtype, experts=5))


@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (10, 4), (40, 8), (70, 3)])
@pytest.mark.parametrize("tokens", [2, 17])
@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_experts(name: str, tokens: int, count: int, top_k: int) -> None:
    verify(make(name, tokens, FP32, experts=count, top_k=top_k, hidden=32, inner=32))


@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (100, 5), (24, 129)])
@pytest.mark.parametrize("tokens", [1, 9, 18])
@pytest.mark.parametrize("name", NAMES)
def test_ragged_sizes(name: str, tokens: int, hidden: int, inner: int) -> None:
    verify(make(name, tokens, experts=3, hidden=hidden, inner=inner))


@pytest.mark.parametrize("tokens", [1, 4, 16, 65])
@pytest.mark.parametrize(("name", "columns"), [(NAMES[0], 1024), (NAMES[0], 1536), (NAMES[1], 512)])
def test_real_sizes(name: str, columns: int, tokens: int) -> None:
    """Every column of some rows of some experts."""
    few = {"hidden": columns, "inner": 8} if name == "experts_gate_up_swiglu" else {"hidden": 32, "inner": columns}
    verify(make(name, tokens, experts=9, top_k=8, **few))


# ------------------------------------------------------------------ promises


@pytest.mark.parametrize("name", NAMES)
def test_tokens_do_not_influence_one_another(name: str) -> None:
    for most, fewer in ((8, (2, 5)), (16, (9,)), (40, (17,))):
        call = make(name, most, experts=4, hidden=32, inner=16)
        whole = call.on(kernels)
        for count in fewer:
            assert same_bits(whole[:, :count], call.first(count).on(kernels))
        stream = call.tensors["h" if "h" in call.tensors else "inner"]
        stream[:, 1] = float("nan")
        spoilt = call.on(kernels)
        assert same_bits(spoilt[:, 2:], whole[:, 2:])
        assert spoilt[:, 1].isnan().all()


def test_tickets_are_left_as_they_were() -> None:
    call = make("experts_down_add", 3)
    workspace = Workspace.allocate(64, 1 << 12, "cpu")
    workspace.partials.fill_(float("nan"))
    first = call.on(kernels, workspace=workspace)
    assert not workspace.tickets.any()
    assert same_bits(first, call.on(kernels, workspace=workspace))
    with pytest.raises(ValueError, match="the workspace holds"):
        call.on(kernels, workspace=Workspace.allocate(1, 1, "cpu"))


def test_large_activations_do_not_overflow() -> None:
    """The products of an expert exceed float16's range where their shares of the stream do not."""
    for tokens in (2, 20):
        call = make("experts_down_add", tokens, FP16)
        call.tensors["inner"].abs_().mul_(2e4).clamp_(max=6e4)
        call.tensors["down"].abs_()
        call.tensors["shares"] /= 2
        assert call.on(reference).isinf().any()
        result = call.on(kernels)
        assert result.isfinite().all()
        exact = call.on(reference, torch.float64)
        torch.testing.assert_close(result.double(), exact, rtol=2**-9, atol=0)


@pytest.mark.parametrize("tokens", [1, 200])
def test_choices_are_sorted(tokens: int) -> None:
    chosen = make("experts_gate_up_swiglu", tokens, experts=7, top_k=3).tensors["chosen"]
    (order, starts), _ = run(lambda: experts_operations.sort_choices(chosen, 9))
    flat = chosen.flatten()
    assert torch.equal(order.long(), flat.argsort(stable=True))
    assert torch.equal(starts.long(), torch.searchsorted(flat.sort().values, torch.arange(10)))


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("name", NAMES)
def test_the_cost_is_the_traffic(name: str, tokens: int) -> None:
    call = make(name, tokens, experts=4, top_k=4, hidden=128, inner=128)
    _, launches = run(lambda: [call.on(kernels)], ORDERS[:1])
    rows, columns = call.weight.shape[0] // 4, call.weight.shape[1]
    shared = {"x_ptr": call.weight, "out_ptr": call.weight, "rows": rows, "tokens": tokens, "choices": 4 * tokens, "TOP_K": 4}
    args = {
        **shared,
        "planes": (call.weight,),
        "SHAPE": SimpleNamespace(columns=columns),
        "columns": columns,
        "slots": 4,
        "experts": 4,
        "SWIGLU": "gate" in name,
        "hidden": rows,
    }
    costs = {
        "_experts_gate_up_swiglu_kernel": (experts, "_cost"),
        "_experts_down_add_kernel": (experts, "_cost"),
        "_sort_choices_kernel": (grouped, "_sort_cost"),
        "_grouped_kernel": (grouped, "_product_cost"),
        "_combine_kernel": (grouped, "_combine_cost"),
    }
    for launch in launches:
        module, function = costs[launch.name]
        counted = cost(module, launch, args, function)["bytes"]
        scratch = launch["partials_ptr"].read_bytes + launch["partials_ptr"].written_bytes if "partials" in str(launch.arguments) else 0
        assert counted == pytest.approx(launch.read_bytes + launch.written_bytes - scratch, rel=0.05), launch.name


# ------------------------------------------------------------------ torch, and what is refused


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("name", NAMES)
def test_torch_sees_through_them(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make(name, tokens, experts=3)
    weight = call.matrix(call.weight.dtype)  # modules are made outside of what is compiled
    monkeypatch.setattr(type(call), "matrix", lambda self, dtype: weight)
    compiled = torch.compile(lambda: call.on(kernels), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(), call.on(kernels))
    t, ops = call.tensors, torch.ops.granite_kernels
    rows = call.weight.shape[0] // 3
    if tokens == 2 and "h" in t:
        torch.library.opcheck(ops.experts_gate_up_swiglu.default, (t["h"], [t["gate_up"]], "dense", 3, rows, t["chosen"]))
    elif tokens == 2:
        scratch = torch.zeros(64, dtype=torch.int32), torch.zeros(1 << 12)
        planes = t["inner"], [t["down"]], "dense", 3, rows
        torch.library.opcheck(ops.experts_down_add.default, (*planes, t["chosen"], t["shares"], t["residual"], *scratch, 0.22))
    else:
        order, starts = ops.sort_choices(t["chosen"], 3)
        torch.library.opcheck(ops.sort_choices.default, (t["chosen"], 3))
        if "h" in t:
            torch.library.opcheck(ops.grouped_gate_up_swiglu.default, (t["h"], t["gate_up"], t["chosen"], order, starts))
        else:
            torch.library.opcheck(ops.grouped_down_add.default, (t["inner"], t["down"], order, starts, t["shares"], t["residual"], 0.22))


def test_no_tokens() -> None:
    for name in NAMES:
        call = make(name, 2).first(0)
        assert call.on(kernels).shape == call.on(reference).shape


def test_what_does_not_fit_is_refused() -> None:
    up, down = make("experts_gate_up_swiglu", 2), make("experts_down_add", 2)

    def changed(call: Call, **tensors: Tensor) -> Call:
        return dataclasses.replace(call, tensors={**call.tensors, **tensors})

    with pytest.raises(GraniteError, match=r"x \(1, 2, 63\) and a weight \[512, 64\] of 8 experts don't go together"):
        changed(up, h=up.tensors["h"][..., 1:]).on(kernels)
    with pytest.raises(GraniteError, match="of 3 experts don't go together"):
        dataclasses.replace(up, experts=3).on(kernels)
    with pytest.raises(GraniteError, match=r"x is torch\.float64"):
        up.on(kernels, torch.float64)
    with pytest.raises(GraniteError, match=r"chosen is torch\.int64"):
        changed(up, chosen=up.tensors["chosen"].long()).on(kernels)
    with pytest.raises(GraniteError, match=r"chosen \(1, 1, 2\)"):
        changed(up, chosen=up.tensors["chosen"][:, :1]).on(kernels)
    with pytest.raises(GraniteError, match="don't go together with a weight"):
        changed(down, shares=down.tensors["shares"][..., :1]).on(kernels)
    with pytest.raises(GraniteError, match=r"expected float32 and torch\.bfloat16"):
        changed(down, residual=down.tensors["residual"].float()).on(kernels)


def test_a_column_major_weight_is_copied() -> None:
    call = make("experts_gate_up_swiglu", 2, FP32)
    call.tensors["gate_up"] = call.tensors["gate_up"].T.contiguous().T
    assert_accurate(call.on(kernels), call.on(reference, torch.float64), call.on(reference))
