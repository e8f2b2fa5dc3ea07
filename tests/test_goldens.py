"""llama.cpp's own blocks, errors, choice of types and logits (tests/data, made by tests/make_goldens.py)."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from granite_kernels.model.checkpoint import open_checkpoint
from granite_kernels.model.checkpoint.gguf_names import gguf_name

from granite_kernels import GraniteForCausalLM
from granite_kernels.formats import GGUF_NAMES, get, get_gguf
from granite_kernels.formats.mix import DENSE, format_of
from tests import make_goldens, tiny

DATA = Path(__file__).parent / "data"
TOLD = json.loads((DATA / "llama_cpp.json").read_text())
ARRAYS = np.load(DATA / "llama_cpp.npz")


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_blocks_as_llama_cpp_writes_them(name: str) -> None:
    blocks = ARRAYS[f"blocks/{name}"]
    format, shape = get_gguf(name), (4, 512)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()]))
    planes = format.pack(torch.from_numpy(blocks), shape)
    assert torch.equal(format.unpack(planes, shape), expected)
    assert torch.equal(format.blocks(planes, shape), torch.from_numpy(blocks))


@pytest.mark.parametrize("kind", make_goldens.KINDS)
@pytest.mark.parametrize("name", ["q8_0", "q4_k", "q6_k", "q5_0"])
def test_quantizers_lose_no_more_than_llama_cpp(name: str, kind: str) -> None:
    weight = torch.from_numpy(make_goldens.matrix(kind, 32, 1024))
    values = get(name).unpack(get(name).quantize(weight), weight.shape)
    error = ((values - weight).double().norm() / weight.double().norm()).item()
    assert error == pytest.approx(TOLD["errors"][f"{name}/{kind}"], rel=0.005)  # 2 % is allowed; the same search gives the same error


@pytest.mark.parametrize("name", make_goldens.MODELS)
def test_q4_k_m_has_the_types_that_llama_cpp_chooses(name: str, tmp_path: Path) -> None:
    layers = make_goldens.DEEP[name]
    source = make_goldens.granite(tmp_path, {**make_goldens.MODELS[name], "num_hidden_layers": layers})
    path = make_goldens.plain(source, tmp_path / "model.gguf")
    with open_checkpoint(path) as checkpoint:
        found = {
            gguf_name(tensor): format_of("q4_k_m", tensor, info.shape[-1], layers=layers, tied=True)
            for tensor, info in checkpoint.tensors.items()
        }
    assert {tensor: "f32" if format == DENSE else format for tensor, format in found.items()} == TOLD["types"][name]


@pytest.mark.parametrize("name", make_goldens.MODELS)
def test_logits_are_llama_cpps(name: str, tmp_path: Path) -> None:
    source = make_goldens.granite(tmp_path / "source", make_goldens.MODELS[name])
    files = {q: make_goldens.drawn(source, q, tmp_path / f"{q}.gguf") for q in make_goldens.QUANTIZATIONS}
    for quantization, path in {"f32": source, **files}.items():
        model = GraniteForCausalLM.from_pretrained(path, device="cpu", dtype=torch.float32)
        logits = model(torch.tensor([make_goldens.IDS]), logits_to_keep=1).logits[0, 0]
        stem = f"logits/{name}-{quantization}"
        assert tiny.spread_error(logits, torch.from_numpy(ARRAYS[stem if quantization == "f32" else f"{stem}-rounded"])) < 1e-5
        # as it computes the packed file: llama.cpp rounds the activations to 8 bits before each product, which costs it this much
        theirs = torch.from_numpy(ARRAYS[stem])
        assert (logits - theirs).square().mean().sqrt() < 1e-3 * (theirs.max() - theirs.min())
        assert logits.argmax() == theirs.argmax()
