"""`quantization=`: the bytes, and the model that results; the mixes themselves are test_mix's matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from granite_kernels.model import room
from granite_kernels.model.checkpoint import Stored, TensorInfo, open_checkpoint
from granite_kernels.model.checkpoint.layout import expected_tensors
from granite_kernels.model.packing import pack, stack_experts
from granite_kernels.model.quantization import plan, stored_bytes

from granite_kernels import GraniteConfig, GraniteForCausalLM, formats
from granite_kernels.errors import GraniteError
from granite_kernels.formats.mix import QUANTIZATIONS
from tests import tiny, tiny_gguf


def tensors(config: GraniteConfig) -> dict[str, TensorInfo]:
    """The table of a GGUF in bfloat16, where the halves of gate and up stand apart."""
    file = Path("model.gguf")
    return {
        name: TensorInfo(name, expected.shape, "bfloat16", 2 * torch.Size(expected.shape).numel(), file, name)
        for name, expected in expected_tensors(config, split=True).items()
    }


@pytest.mark.parametrize(
    ("quantization", "limit"), [("q4_k_m", 1.60e9), ("q6_k", 2.10e9), ("q8_0", 2.72e9), ("int4", 1.36e9), ("int8", 2.56e9)]
)
def test_the_bytes_of_2b(quantization: str, limit: float) -> None:
    config = GraniteConfig.preset("3.1-2b")
    found = tensors(config)
    assert 0.95 * limit < stored_bytes(found, plan(found, config.num_hidden_layers, quantization, "here"), torch.bfloat16) <= limit


@pytest.mark.parametrize("kind", ["granite", "granitemoe"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_quantized_model_is_that_of_its_rounded_weights(quantization: str, kind: str, tmp_path: Path) -> None:
    theirs, ids = tiny.make(kind, intermediate_size=128), tiny.prompts(2, 9)
    folder = tiny.save(theirs.to(torch.bfloat16), tmp_path)
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        chosen = plan(checkpoint.tensors, theirs.config.num_hidden_layers, quantization, folder)
        for name, format in chosen.items():
            stored = checkpoint.read(name)
            matrix = stored.data.view(-1, stored.shape[-1])
            values = formats.get(format).unpack(formats.get(format).quantize(matrix), matrix.shape)
            own = (
                name
                if kind == "granite"
                else name.replace("input_linear.weight", "experts.gate_up_proj").replace("output_linear.weight", "experts.down_proj")
            )
            theirs.get_parameter(own).data = values.view(stored.shape)
    rounded = theirs.float()
    ours = GraniteForCausalLM.from_pretrained(folder, quantization=quantization, dtype=torch.float32, device="cpu")
    assert ours.weights.head is ours.weights.embed
    assert all(format != "dense" for module in ours.weights.modules() if hasattr(module, "formats") for format in module.formats)
    with torch.no_grad():
        assert tiny.spread_error(ours(ids).logits, rounded(ids).logits) < 1e-4
    assert torch.equal(
        ours.generate(ids, max_new_tokens=4, eos_token_id=[]),
        rounded.generate(ids, max_new_tokens=4, eos_token_id=None, do_sample=False, pad_token_id=0),
    )


def test_random_weights_are_quantized_too() -> None:
    config = GraniteConfig.from_dict({**tiny.granite_config(), "model_type": "granite"})
    model = GraniteForCausalLM.from_config(config, quantization="int4", dtype=torch.bfloat16, device="cpu")
    assert model.weights.layers[0].qkv.formats == ("int4_g128",) and model.weights.embed.formats == ("int8",)
    assert model.memory().bits_per_weight < 5
    assert model.generate(tiny.prompts(1, 3), max_new_tokens=2).shape == (1, 5)


def test_packed_weights_are_not_quantized_again(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_gguf.write(tiny.make(), path, "Q8_0")
    with pytest.raises(GraniteError, match=r"model.gguf: its weights are already packed \(q8_0\).*leave it out"):
        GraniteForCausalLM.from_pretrained(path, quantization="int4", device="cpu")


def test_unknown_quantizations_are_refused() -> None:
    with pytest.raises(GraniteError, match="quantization is 'q5_k', expected None or one of int8, int4, q8_0, q6_k, q4_k_m"):
        GraniteForCausalLM.from_config("3.1-2b", quantization="q5_k", device="cpu")


def test_where_memory_runs_out_a_quantization_that_fits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most exact of them; none for weights that are packed already."""
    theirs = tiny.make(intermediate_size=256)
    folder, whole = tiny.save(theirs.to(torch.bfloat16), tmp_path / "source"), 2 * theirs.num_parameters()
    tiny_gguf.write(theirs.float(), tmp_path / "model.gguf", "Q8_0")
    for share, said in ((0.6, "quantization='q8_0' would fit"), (0.45, "quantization='q6_k' would fit"), (0.1, "a smaller model")):
        free = int(share * whole)
        monkeypatch.setattr(room, "available", lambda device, free=free: free)
        with pytest.raises(GraniteError, match=f"weights take 0.00 GB in bfloat16, 0.00 GB are free on cpu; {said}"):
            GraniteForCausalLM.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(GraniteError, match="a smaller model, or a device with more memory, is needed"):
        GraniteForCausalLM.from_pretrained(tmp_path / "model.gguf", device="cpu", backend="torch", dtype=torch.bfloat16)


def test_halves_of_experts_are_joined_expert_by_expert() -> None:
    halves = [torch.randn(3, 32, 256, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    cpu = torch.device("cpu")
    for format in ("q6_k", "int4_g128", "int8"):
        parts = [pack(Stored("float32", half, (3, 32, 256)), format, torch.float32, cpu) for half in halves]
        joined = stack_experts(parts, 3)
        assert joined is not None and joined.shape == (192, 256)
        values = [formats.get(format).unpack(part.planes, part.shape).view(3, 32, 256) for part in parts]
        found = formats.get(format).unpack(joined.parts[0].planes, joined.shape)
        assert torch.equal(found.view(3, 64, 256), torch.cat(values, 1))
    assert stack_experts([parts[0], pack(Stored("float32", halves[1], (3, 32, 256)), "q8_0", torch.float32, cpu)], 3) is None
