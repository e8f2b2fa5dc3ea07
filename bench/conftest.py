"""`pytest bench/ --benchmark-*`: each operation and implementation as a benchmark of pytest-benchmark.

On a GPU the clock is the GPU's own and a round is one replay of a captured rotation, so that `pytest-benchmark compare` holds CUDA time
against CUDA time. Wrong kernels fail before they are timed; absent rivals are skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from granite_kernels.bench import machine
from granite_kernels.bench.harness import Case, Ready, call, clone, prepare, rotating, widen
from granite_kernels.bench.kernels import DTYPES, FORMATS
from granite_kernels.bench.roof import exact_float32
from granite_kernels.bench.shapes import Setting
from granite_kernels.bench.timing import copies_of, cuda_clock
from granite_kernels.model.config import GraniteConfig

SMALL: dict[str, Any] = dict(hidden_size=64, intermediate_size=64, vocab_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("granite-kernels")
    group.addoption("--preset", default="3.1-2b", help="the model whose sizes are measured")
    group.addoption("--tokens", type=int, action="append", help="tokens of a call; several times for several (default 1)")
    group.addoption("--weights", default="none", help="format of the matrices: none, q8_0, q4_k_m, ...")
    group.addoption("--dtype", default=None, choices=tuple(DTYPES))
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def setting_of(config: pytest.Config, tokens: int) -> Setting:
    device = torch.device(config.getoption("--device"))
    dtype = config.getoption("--dtype") or ("bfloat16" if device.type == "cuda" else "float32")
    weights = config.getoption("--weights")
    return Setting(GraniteConfig.preset(config.getoption("--preset")), tokens, 1024, FORMATS.get(weights, weights), device, DTYPES[dtype])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and implementation. The cases are counted at small sizes: making the real ones takes memory."""
    if "measured" not in metafunc.fixturenames:
        return
    values, ids = [], []
    for tokens in metafunc.config.getoption("--tokens") or [1]:
        setting = setting_of(metafunc.config, tokens)
        small = dataclasses.replace(
            setting, config=dataclasses.replace(setting.config, **SMALL), format="dense", device=torch.device("cpu")
        )
        for index, case in enumerate(metafunc.module.cases(small)):
            for number, rival in enumerate(dataclasses.replace(case, setting=setting).implementations):
                values.append((metafunc.module.__name__.rpartition(".")[2], tokens, index, number))
                ids.append(f"{case.op}-{case.role or case.file}-{tokens}-{rival.name}".replace(" ", "_"))
    metafunc.parametrize("measured", values, ids=ids, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") != "cpu":
        clock = functools.cache(cuda_clock)  # no device is asked for before the first reading
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=lambda: clock()()))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["granite_kernels"] = machine.header(torch.device(config.getoption("--device")))


@functools.lru_cache(maxsize=1)
def verified(module: str, setting: Setting, index: int) -> tuple[Case, list[torch.Tensor], list[torch.Tensor]]:
    """A case with its exact and its eager results; the last one is kept, for its implementations follow each other."""
    found = importlib.import_module(f"granite_kernels.bench.{module}").cases(setting)
    case: Case = next(case for position, case in enumerate(found) if position == index)
    return case, call(case, case.reference, widen(case.inputs)), call(case, case.reference, case.inputs)


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Callable[[], None]]:
    """Verifies, then times, one implementation of one case."""
    module, tokens, index, number = request.param
    with torch.no_grad(), exact_float32():
        case, exact, eager = verified(module, setting_of(request.config, tokens), index)
        rival = case.implementations[number]
        found = prepare(case, rival, exact, eager)
        if not isinstance(found, Ready):
            (pytest.skip if found["status"] == "absent" else pytest.fail)(f"{rival.name} {found['status']}: {found['note']}")
        count = copies_of(case.cost.bytes, case.inputs.nbytes, case.setting.device)
        run = rotating(found, [case.inputs, *(clone(case.inputs) for _ in range(count - 1))])

        def rotation() -> None:
            for copy in range(count):
                run(copy)

        def time() -> None:
            benchmark.extra_info |= {"calls_a_round": count, "bytes": case.cost.bytes, "flops": case.cost.flops, "size": case.size}
            benchmark(captured(rotation) if case.setting.device.type == "cuda" else rotation)
            seconds = benchmark.stats.stats.median / count if benchmark.stats is not None else None
            benchmark.extra_info |= {"us_a_call": 1e6 * seconds, "gbps": case.cost.bytes / seconds / 1e9} if seconds else {}

        yield time


def captured(rotation: Callable[[], None]) -> Callable[[], None]:
    """The rotation as a CUDA graph; as it is where it can't be captured."""
    rotation()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            rotation()
    except RuntimeError:
        torch.cuda.synchronize()
        return rotation
    return graph.replay
