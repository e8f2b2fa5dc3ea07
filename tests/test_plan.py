"""`plan`: sizes against published files and models that were built, bounds, cards, and what the command prints."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from granite_kernels.bench import evidence
from granite_kernels.bench.gpus import GPUS, find
from granite_kernels.bench.harness import OURS
from granite_kernels.bench.offline.cards import CARDS
from granite_kernels.bench.plan import activation_bytes, bound, fits, footprint, footprints, largest_context, need
from granite_kernels.model import granite
from granite_kernels.model.cache import Cache
from granite_kernels.model.checkpoint.layout import expected_tensors
from granite_kernels.model.cli import cli
from granite_kernels.model.config import GraniteConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from granite_kernels import GraniteForCausalLM
from granite_kernels.errors import GraniteError
from granite_kernels.formats import get
from granite_kernels.formats.mix import QUANTIZATIONS
from granite_kernels.ops import choose
from granite_kernels.weight import DENSE, Part, Weight
from granite_kernels.workspace import Workspace
from tests import tiny

# GB of the tensors in files of llama.cpp's quantizer; the pages of the models print their first three digits
PUBLISHED = {
    "3.1-2b": {None: 5.067, "q8_0": 2.692, "q6_k": 2.079, "q4_k_m": 1.544},
    "3.1-8b": {None: 16.342, "q8_0": 8.683, "q6_k": 6.704, "q4_k_m": 4.941},
    "3.1-1b-a400m": {None: 2.671, "q8_0": 1.421, "q6_k": 1.097, "q4_k_m": 0.820},
    "3.1-3b-a800m": {None: 6.602, "q8_0": 3.511, "q6_k": 2.713, "q4_k_m": 2.015},
}
TWO = GraniteConfig.preset("3.1-2b")


@pytest.mark.parametrize("preset", PUBLISHED)
def test_files_have_the_published_sizes_and_memory_is_close_to_them(preset: str) -> None:
    for quantization, published in PUBLISHED[preset].items():
        found = footprint(GraniteConfig.preset(preset), quantization)
        assert found.file / 1e9 == pytest.approx(published, abs=6e-4)
        assert found.weights == pytest.approx(found.file, rel=0.03)


@pytest.mark.parametrize(("preset", "kib"), [("3.1-2b", 80), ("3.1-8b", 160), ("3.1-1b-a400m", 48), ("3.1-3b-a800m", 64)])
def test_the_cache_of_a_token(preset: str, kib: int) -> None:
    config = GraniteConfig.preset(preset)
    weights = footprint(config, None)
    assert need(config, weights, 3, 1024).cache == 3 * 1024 * kib * 1024
    assert need(config, weights, 1, 1025).cache == 1280 * kib * 1024  # the cache grows by blocks of 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["granite", "granitemoeshared"])
def test_the_prediction_is_the_storage_of_a_model_that_was_built(kind: str, dtype: torch.dtype) -> None:
    values = tiny.granite_config() if kind == "granite" else tiny.moe_config()
    config = GraniteConfig.from_dict({**values, "model_type": kind, "torch_dtype": str(dtype).removeprefix("torch.")})
    model = GraniteForCausalLM.from_config(config, device="cpu")
    found = footprint(config, None)
    assert found.weights == model.memory().weights
    assert found.bits_per_weight == pytest.approx(model.memory().bits_per_weight)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it held at once; storages that were there before don't count."""

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.holders = Counter(tensor.untyped_storage()._cdata for tensor in before)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if not self.holders[key]:
                self.live += size
                self.peak = max(self.peak, self.live)
            self.holders[key] += 1
            weakref.finalize(tensor, self._let_go, key, size)
        return out

    def _let_go(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            self.live -= size


def weights_of(config: GraniteConfig, format: str, dtype: torch.dtype) -> granite.Weights:
    """Weights in `format` with nothing in them, to be made under a FakeTensorMode."""

    def matrix(rows: int, columns: int) -> Weight:
        layout = [((rows, columns), dtype)] if format == DENSE else get(format).layout((rows, columns))
        return Weight(Part(format, tuple(torch.empty(shape, dtype=kind) for shape, kind in layout), (rows, columns)))

    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    attended, norm = config.num_attention_heads * head_dim, torch.empty(hidden, dtype=dtype)
    qkv = attended + 2 * config.num_key_value_heads * head_dim
    layers = [
        granite.Layer(norm, matrix(qkv, hidden), matrix(hidden, attended), norm, matrix(2 * inner, hidden), matrix(hidden, inner))
        for _ in range(config.num_hidden_layers)
    ]
    embed = matrix(config.vocab_size, hidden)
    return granite.Weights(embed, layers, norm, embed)


@pytest.mark.parametrize(
    ("preset", "quantization", "batch", "tokens"),
    [("3.1-2b", None, 1, 2048), ("3.1-8b", None, 4, 1000), ("3.1-2b", "q8_0", 1, 2048)],
)
def test_the_activations_of_a_prompt_on_the_kernels_are_those_predicted(
    preset: str, quantization: str | None, batch: int, tokens: int
) -> None:
    config, dtype, cpu = dataclasses.replace(GraniteConfig.preset(preset), num_hidden_layers=3), torch.bfloat16, torch.device("cpu")
    with FakeTensorMode():  # nothing is allocated and nothing computed: real sizes cost nothing
        weights = weights_of(config, quantization or DENSE, dtype)
        cache = Cache.allocate(config, batch, tokens, dtype=dtype, device=cpu)
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        inputs = granite.Inputs(ids, ids.int(), torch.empty(tokens, config.head_dim, dtype=dtype))
        ops = choose("triton", cpu, dtype, workspace=Workspace.allocate(1 << 10, 1 << 20, "cpu"))
        there = (*weights.parameters(), *weights.buffers(), cache.k, cache.v, cache.lengths, cache.starts, inputs.rotary)
        with torch.no_grad(), Peak((*there, ids, inputs.positions)) as peak:
            granite.forward(config, weights, inputs, cache, ops)
    assert activation_bytes(config, footprint(config, quantization), batch * tokens) == pytest.approx(peak.peak, rel=0.01)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_prediction_is_the_storage_of_a_model_that_was_quantized(quantization: str) -> None:
    sizes = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=3, vocab_size=1003, num_attention_heads=8)
    model = GraniteForCausalLM.from_config(dataclasses.replace(TWO, **sizes), quantization=quantization, device="cpu")
    found = footprint(model.config, quantization)
    assert found.weights == model.memory().weights
    assert found.bits_per_weight == pytest.approx(model.memory().bits_per_weight)


def test_the_smallest_comes_first_and_a_packed_checkpoint_stands_as_stored() -> None:
    found = footprints(TWO)
    assert [one.weights for one in found] == sorted(one.weights for one in found)
    stored = {name: "q4_0" if len(expected.shape) > 1 else "float32" for name, expected in expected_tensors(TWO).items()}
    (packed,) = (one for one in footprints(TWO, stored=stored) if one.label == "as stored")
    assert packed.bits_per_weight == pytest.approx(4.5, abs=0.01)


# 3,350 GB/s over the bytes of a step at 1,024 tokens
@pytest.mark.parametrize(("quantization", "expected"), [(None, 650), ("q8_0", 1207), ("q6_k", 1549)])
def test_the_bound_is_bandwidth_over_bytes(quantization: str | None, expected: int) -> None:
    assert bound(TWO, footprint(TWO, quantization), 1, 1024, find("H100 SXM").bandwidth) == pytest.approx(expected, abs=0.6)


def test_a_mixture_reads_its_chosen_experts_and_a_batch_more_of_them() -> None:
    config = GraniteConfig.preset("3.1-1b-a400m")
    alone, few, many = (footprint(config, None, batch) for batch in (1, 4, 1000))
    assert alone.read == 2 * config.active_parameters()
    assert alone.read < few.read < many.read
    assert many.read == pytest.approx(many.weights, rel=1e-6)


@pytest.mark.parametrize("quantization", [None, "q4_k_m"])
@pytest.mark.parametrize("card", ["GeForce RTX 3060 Ti", "L4"])
def test_the_longest_context_fits_and_the_next_does_not(card: str, quantization: str | None) -> None:
    config, gpu = dataclasses.replace(TWO, max_position_embeddings=1 << 24), find(card)
    weights = footprint(config, quantization)
    longest = largest_context(config, weights, 2, gpu)
    assert longest > 0
    assert fits(need(config, weights, 2, longest, gpu.arch).total, gpu)
    assert not fits(need(config, weights, 2, longest + 256, gpu.arch).total, gpu)


def test_what_does_not_fit_at_all_has_no_context() -> None:
    config = GraniteConfig.preset("3.1-8b")
    assert largest_context(config, footprint(config, None), 1, find("RTX 4080")) == 0
    assert largest_context(TWO, footprint(TWO, None), 1, find("H200")) == TWO.max_position_embeddings


def test_cards_agree_with_those_of_the_static_roofline() -> None:
    assert len(GPUS) >= 30
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for card in CARDS:
        gpu = find({"A100 80GB": "A100 80GB SXM"}.get(card.name, card.name))
        assert (gpu.arch, gpu.bandwidth) == (card.arch, pytest.approx(card.bandwidth, rel=0.002))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("3060", "GeForce RTX 3060"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell"),
    ],
)
def test_a_card_is_known_by_its_names(name: str, expected: str) -> None:
    assert find(name).name == expected


@pytest.mark.parametrize(
    ("name", "message"), [("h100", "may be H100 PCIe, H100 SXM, H100 NVL"), ("TPU", "expected one of"), ("", "expected")]
)
def test_a_card_that_is_no_one_is_refused(name: str, message: str) -> None:
    with pytest.raises(GraniteError, match=message):
        find(name)


def test_measurements_are_quoted_where_they_are_of_this_model(tmp_path: Path) -> None:
    row: dict[str, Any] = {"kind": "speed", "implementation": OURS, "test": "tg128", "status": "ok", "context": 0, "batch": 1}
    speeds = [
        {**row, "model": "random:3.1-2b", "format": "bfloat16", "tokens_per_second": 480.0},
        {**row, "model": "random:3.1-2b", "format": "q4_k_m", "tokens_per_second": 990.0, "status": "error"},
        {**row, "model": "random:3.1-8b", "format": "bfloat16", "tokens_per_second": 170.0},
        {**row, "model": "random:3.1-2b", "format": "bfloat16", "tokens_per_second": 90.0, "implementation": "transformers"},
    ]
    (tmp_path / "h100.json").write_text(json.dumps({"header": {"device": "NVIDIA H100 80GB HBM3"}, "rows": speeds}))
    judged = {"kind": "quality", "model": "SmolLM2", "format": "q8_0", "bits_per_weight": 8.5, "kl": 0.00123, "top1": 0.991}
    (tmp_path / "quality.json").write_text(json.dumps({"header": {}, "rows": [judged]}))
    (tmp_path / "offline.json").write_text("[]")
    assert evidence.speeds(TWO, tmp_path) == {("H100 SXM", "F16", 1): 480.0}
    assert evidence.quality(tmp_path) == {"Q8_0": "KL 0.0012, top-1 99.1% (SmolLM2, 8.50 bits)"}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["plan", *arguments])


def test_the_command_prints_everything_as_json() -> None:
    found = json.loads(run("3.1-2b", "--json", "--context", "1024").stdout)
    assert (found["cache_bytes_per_token"], found["parameters"]) == (81920, TWO.parameters())
    assert [row["format"] for row in found["formats"]] == ["int4", "Q4_K_M", "Q6_K", "int8", "Q8_0", "F16"]
    for row in found["formats"]:
        assert row["total_bytes"] == row["weight_bytes"] + row["cache_bytes"] + row["workspace_bytes"]
        assert len(row["gpus"]) == len(GPUS)
        assert [gpu["memory_gb"] for gpu in row["gpus"]] == sorted(gpu["memory_gb"] for gpu in row["gpus"])


def test_the_command_prints_tables() -> None:
    every = run("3.1-8b").stdout
    assert all(f" {gpu.name} " in every for gpu in GPUS)
    one = run("3.1-8b", "--gpu", "4060 Ti 16GB").stdout
    assert "GeForce RTX 4060 Ti 16GB: 16 GB, 288 GB/s" in one
    assert [line.split()[:2] for line in one.splitlines() if " yes " in line or " no " in line][-1] == ["F16", "no"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("3.1-2b", "--context", "131073"), "context is 131073, expected at most 131072"),
        (("3.1-5b",), "3.1-5b: no such file or folder; expected one, a hub id, demo, or one of 3.1-2b"),
        (("random:3.1-5b",), "there is no preset '3.1-5b'"),
    ],
)
def test_the_command_refuses(arguments: tuple[str, ...], message: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, GraniteError)
    assert message in str(error)
