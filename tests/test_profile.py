"""`profile`: which role runs how often, what it should move, whose kernel is whose, and the timeline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from granite_kernels.bench.attribution import Launch, by_kernel, by_role, passes, pieces
from granite_kernels.bench.cli_profile import show
from granite_kernels.bench.profiling import Profile, profile
from granite_kernels.bench.roles import ROLES, Call, Watch, launches, ranges
from granite_kernels.model import granite
from granite_kernels.model.cache import Cache
from granite_kernels.model.cli import cli
from granite_kernels.model.config import GraniteConfig

from granite_kernels import GraniteForCausalLM
from granite_kernels.errors import GraniteError
from granite_kernels.ops import choose
from granite_kernels.reference.rope import rotary_table
from tests import tiny

PROMPT, NEW = 40, 4


def built(kind: str) -> GraniteForCausalLM:
    values = tiny.granite_config() if kind == "granite" else tiny.moe_config()
    return GraniteForCausalLM.from_config(GraniteConfig.from_dict({**values, "model_type": kind}), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[GraniteForCausalLM, Profile, Path]:
    model, trace = built("granite"), tmp_path_factory.mktemp("trace") / "trace.json"
    return model, profile(model, PROMPT, NEW, trace), trace


def test_every_role_runs_as_often_as_the_model_has_layers_and_steps(dense: tuple[GraniteForCausalLM, Profile, Path]) -> None:
    model, found, _ = dense
    prefill, decode = found.phases
    assert (prefill.passes, decode.passes) == (1, NEW - 1)
    layers = model.config.num_hidden_layers
    often = ["norm_qkv_rope_append", "o", "norm_gate_up_swiglu", "down"]
    for phase, attention in ((prefill, "attention"), (decode, "attention_decode")):
        counts = {role.role: role.calls for role in phase.roles}
        once = dict.fromkeys(["embed", "norm_logits", "sample_step"], phase.passes)
        assert counts == once | dict.fromkeys([*often, attention], layers * phase.passes)


def test_times_add_up(dense: tuple[GraniteForCausalLM, Profile, Path]) -> None:
    for phase in dense[1].phases:
        assert all(role.seconds > 0 for role in phase.roles)
        assert sum(role.seconds for role in phase.roles) + phase.outside == pytest.approx(phase.profiled)
        for role in phase.roles:
            own = sum(kernel.seconds for kernel in phase.kernels if kernel.role == role.role)
            assert own == pytest.approx(role.seconds)
        assert any(kernel.kernel == "aten::mm" and kernel.role == "down" for kernel in phase.kernels)


def test_a_role_counts_its_weights_its_activations_and_its_part_of_the_cache(dense: tuple[GraniteForCausalLM, Profile, Path]) -> None:
    model, found, _ = dense
    config, size = model.config, 4
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    prefill, decode = ({role.role: role for role in phase.roles} for phase in found.phases)
    steps = NEW - 1

    gate_up = decode["norm_gate_up_swiglu"]
    assert gate_up.nbytes == steps * layers * size * (2 * inner * hidden + 2 * hidden + inner)
    assert gate_up.flops == steps * layers * 2 * 2 * inner * hidden
    seen = sum(PROMPT + 1 + number for number in range(steps))
    assert decode["attention_decode"].nbytes == layers * size * (2 * kv_heads * head_dim * seen + steps * 2 * heads * head_dim)
    assert prefill["attention"].flops == layers * 4 * heads * head_dim * PROMPT * (PROMPT + 1) // 2
    qkv = (heads + 2 * kv_heads) * head_dim * hidden
    activations = PROMPT * (hidden + heads * head_dim + 2 * kv_heads * head_dim)
    assert prefill["norm_qkv_rope_append"].nbytes == layers * size * (qkv + hidden + activations)
    assert prefill["o"].nbytes == layers * size * (heads * head_dim * hidden + PROMPT * (heads * head_dim + 2 * hidden))
    assert decode["norm_logits"].nbytes == steps * size * (config.vocab_size * hidden + 2 * hidden + config.vocab_size)
    assert decode["embed"].nbytes == steps * size * 2 * hidden  # a row read, a row written


def test_the_timeline_nests_roles_in_layers_in_passes(dense: tuple[GraniteForCausalLM, Profile, Path]) -> None:
    model, _, path = dense
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "user_annotation"]

    def spans(*names: str) -> list[tuple[float, float]]:
        return [(event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] in names]

    def within(inner: list[tuple[float, float]], outer: list[tuple[float, float]]) -> bool:
        return all(any(a <= start and end <= b for a, b in outer) for start, end in inner)

    layers = spans(*(f"layer {number}" for number in range(model.config.num_hidden_layers)))
    whole = spans("prefill", *(f"decode {number}" for number in range(NEW - 1)))
    assert len(layers) == NEW * model.config.num_hidden_layers
    assert len(whole) == NEW
    assert within(spans("norm_qkv_rope_append", "attention", "attention_decode", "o", "norm_gate_up_swiglu", "down"), layers)
    assert within(layers, whole)
    assert not within(spans("norm_logits"), layers)


def test_a_mixture_counts_the_experts_that_its_tokens_meet() -> None:
    model = built("granitemoeshared")
    decode = {role.role: role for role in profile(model, 8, 3).phases[1].roles}
    config = model.config
    hidden, inner, chosen = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    calls = 2 * config.num_hidden_layers
    assert decode["experts_gate_up_swiglu"].calls == calls
    assert decode["experts_gate_up_swiglu"].nbytes == calls * 4 * (2 * inner * hidden * chosen + hidden + chosen * inner)
    assert decode["experts_down_add"].flops == calls * 2 * inner * hidden * chosen
    assert set(decode) >= {"norm_route", "experts_gate_up_swiglu", "experts_down_add"}


def test_watched_operations_compute_the_same() -> None:
    model = built("granite")
    config, ids = model.config, tiny.prompts(1, 5)
    positions = torch.arange(5, dtype=torch.int32)[None]
    inputs = granite.Inputs(ids, positions, rotary_table(8, config.head_dim, config.rope_theta, dtype=torch.float32, device="cpu"))
    ops, results = choose("torch", torch.device("cpu"), torch.float32), []
    for watched in (False, True):
        cache = Cache.allocate(config, 1, 8, dtype=torch.float32, device=torch.device("cpu"))
        chosen = Watch(config, cache, ranges(False)).wrap(ops) if watched else ops
        results.append(granite.forward(config, model.weights, inputs, cache, chosen))
        assert chosen.choices == ops.choices
    assert torch.equal(*results)


def event(name: str, *children: Any, range: bool = False, kernels: tuple[tuple[str, float], ...] = (), time: float = 0.0) -> Any:
    """A node of the profiler's tree as a GPU gives it."""
    made = SimpleNamespace(
        name=name,
        is_user_annotation=range,
        device_type=SimpleNamespace(name="CPU"),
        cpu_children=list(children),
        cpu_parent=None,
        cpu_time_total=time,
        kernels=[SimpleNamespace(name=kernel, duration=micros) for kernel, micros in kernels],
    )
    for child in children:
        child.cpu_parent = made
    return made


def flat(root: Any) -> list[Any]:
    return [root, *(node for child in root.cpu_children for node in flat(child))]


def test_kernels_of_a_gpu_count_for_the_role_that_launched_them() -> None:
    fused = event("o", event("granite_kernels::linear_add", kernels=(("_linear_add_kernel", 5.0),)), range=True)
    composed = event(
        "down",
        event("aten::addmm", event("cudaLaunchKernel"), kernels=(("gemm", 30.0),)),
        event("granite_kernels::rms_norm", kernels=(("_rms_norm_kernel", 2.0),)),
        range=True,
    )
    first = event("prefill", event("layer 0", composed, range=True), range=True, time=50.0)
    second = event("decode 0", event("layer 0", fused, range=True), range=True, time=20.0)
    again = event("decode 1", event("o", event("x", kernels=(("_linear_add_kernel", 7.0),)), range=True), range=True, time=22.0)
    events = [node for root in (first, second, again) for node in flat(root)]
    found = pieces(events, cuda=True)
    calls = [Call("prefill", "down", 1000, 10), Call("decode", "o", 300, 3), Call("decode", "o", 300, 3)]
    told = [Launch("prefill", "down", "_rms_norm_kernel", 64, 6), Launch("decode", "o", "_linear_add_kernel", 1, 1)]

    assert passes(events, "decode") == pytest.approx([20e-6, 22e-6])
    (o,) = by_role("decode", found, calls)
    assert (o.role, o.calls, o.nbytes, o.flops, o.seconds) == ("o", 2, 600, 6, pytest.approx(12e-6))
    (alone,) = by_kernel("decode", found, calls, told)  # does all of the role's work: has its bytes, cache and packed planes included
    assert (alone.kernel, alone.calls, alone.nbytes, alone.seconds) == ("_linear_add_kernel", 2, 600, pytest.approx(12e-6))
    gemm, norm = by_kernel("prefill", found, calls, told)
    assert (gemm.kernel, gemm.nbytes, norm.kernel, norm.nbytes, norm.flops) == ("gemm", 0, "_rms_norm_kernel", 64, 6)


def test_launches_are_heard_within_and_not_after() -> None:
    from triton import knobs
    from triton.compiler.compiler import LazyDict

    heard: list[dict[str, Any]] = []
    with launches(heard.append, cuda=True):
        told = LazyDict({"name": "_k"})
        told.add(lambda nbytes: {"bytes": nbytes}, (8,))
        knobs.runtime.launch_enter_hook(told)
    knobs.runtime.launch_enter_hook(LazyDict({"name": "after"}))
    assert heard == [{"name": "_k", "bytes": 8}]


def test_the_command_prints_json_and_writes_a_timeline(tmp_path: Path) -> None:
    trace, folder = tmp_path / "trace.json", tiny.save(tiny.make(), tmp_path / "model")
    arguments = ["profile", str(folder), "--prompt-tokens", "20", "--new-tokens", "3", "--json", "--trace", str(trace)]
    found = json.loads(CliRunner().invoke(cli, arguments).stdout)
    assert [phase["phase"] for phase in found["phases"]] == ["prefill", "decode"]
    assert {role["role"] for phase in found["phases"] for role in phase["roles"]} <= set(ROLES)
    assert found["trace"] == str(trace)
    assert json.loads(trace.read_text())["traceEvents"]


def test_the_tables_show_a_pass(dense: tuple[GraniteForCausalLM, Profile, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, found, _ = dense
    show("tiny", model, found, PROMPT)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("decode, a step of 3: ") for line in lines)
    assert [line.split()[1] for line in lines if line.startswith(" attention_decode ")] == [str(model.config.num_hidden_layers)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--proton", "p.hatchet"), "--proton needs an NVIDIA GPU"),
        (("--nvtx",), "--nvtx needs an NVIDIA GPU"),
        (("--trace", "nowhere/t.json"), "there is no such folder to write to"),
    ],
)
def test_the_command_refuses_before_it_loads(arguments: tuple[str, ...], message: str) -> None:
    error = CliRunner().invoke(cli, ["profile", "demo", *arguments]).exception
    assert isinstance(error, GraniteError)
    assert message in str(error)
