"""Checkpoints of compressed-tensors, GPTQ and AWQ: the same values as their published packings, in formats of ours."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from granite_kernels.model.checkpoint import open_checkpoint
from granite_kernels.model.packing import values
from granite_kernels.model.weights import Loader
from safetensors.torch import load_file, save_file

from granite_kernels import GraniteForCausalLM
from granite_kernels.errors import GraniteError
from granite_kernels.weight import dense_matrix
from tests import packers, tiny

GATE = "model.layers.0.mlp.gate_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def compressed(format: str = "pack-quantized", *, kind: str = "int", bits: int = 4, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": "group", "group_size": 64, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}


def gptq(bits: int = 4, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 64, "desc_act": False, "sym": True, **more}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
CASES: list[tuple[Callable[..., packers.Module], dict[str, Any], dict[str, Any], str]] = [
    (packers.pack_quantized, {}, compressed(), "int4_g64"),
    (packers.pack_quantized, {"group": 32, "dtype": torch.float16}, compressed(), "int4_g32"),
    (packers.pack_quantized, {"group": None}, compressed(), "int4_g128"),  # a scale for each row, repeated
    (packers.pack_quantized, {"zero": True}, compressed(), "int4_g64_zero"),
    (packers.pack_quantized, {"bits": 8, "group": None}, compressed(bits=8), "int8"),
    (packers.pack_quantized, {"bits": 8}, compressed(bits=8), "q8_0"),
    (packers.int_quantized, {}, compressed("int-quantized", bits=8), "int8"),
    (packers.int_quantized, {"tensor": True}, compressed("int-quantized", bits=8), "int8"),
    (packers.int_quantized, {"group": 64}, compressed("int-quantized", bits=8), "q8_0"),
    (packers.float_quantized, {}, compressed("float-quantized", kind="float", bits=8), "fp8"),
    (packers.float_quantized, {"kind": "tensor"}, compressed("naive-quantized", kind="float", bits=8), "fp8"),
    (packers.gptq, {}, gptq(), "int4_g64"),
    (packers.gptq, {"version": 2}, gptq(checkpoint_format="gptq_v2"), "int4_g64"),
    (packers.gptq, {"sym": False}, gptq(sym=False), "int4_g64_zero"),
    (packers.gptq, {"sym": False, "version": 2}, gptq(sym=False, checkpoint_format="gptq_v2"), "int4_g64_zero"),
    (packers.gptq, {"bits": 8}, gptq(8), "q8_0"),
    (packers.gptq, {"bits": 8, "group": None}, gptq(8, group_size=-1), "int8"),
    (packers.gptq, {"group": 32}, gptq(desc_act=True, group_size=32), "int4_g32"),  # in order, whatever the settings say
    (packers.awq, {}, AWQ, "int4_g64_zero"),
]
DENSE: list[tuple[Callable[..., packers.Module], dict[str, Any], dict[str, Any], str]] = [
    (packers.pack_quantized, {"order": True}, compressed(), r"act-order \(g_idx\)"),
    (packers.pack_quantized, {"zero": True, "bits": 8}, compressed(bits=8), "8-bit weights in groups of 64 columns with zero points"),
    (packers.pack_quantized, {"group": 16}, compressed(), "4-bit weights in groups of 16"),
    (packers.pack_quantized, {"dtype": torch.float32}, compressed(), "scales in torch.float32"),
    (packers.int_quantized, {"zero": True}, compressed("int-quantized", bits=8), "with zero points"),
    (packers.float_quantized, {"kind": "block"}, compressed("float-quantized", kind="float", bits=8), "FP8"),
    (packers.gptq, {"order": True}, gptq(desc_act=True), r"act-order \(g_idx\)"),
    (packers.gptq, {"sym": False, "bits": 8}, gptq(8, sym=False), "8-bit weights"),
]


@pytest.mark.parametrize(("make", "options", "settings", "format"), CASES)
def test_packed_weights_keep_their_values(
    make: Callable[..., packers.Module], options: dict[str, Any], settings: dict[str, Any], format: str, tmp_path: Path
) -> None:
    folder, expected = packers.folder(tmp_path, make, settings, **options)
    with warnings.catch_warnings(action="error"), open_checkpoint(folder) as checkpoint:
        assert checkpoint.packed and checkpoint.tensors.keys() == expected.keys()
        for name, meant in expected.items():
            stored = checkpoint.read(name)
            assert torch.equal(
                values(stored, torch.float32) if stored.metadata or checkpoint.tensors[name].packed else stored.data, meant
            ), name
        assert checkpoint.read(GATE).format == format
        assert checkpoint.tensors[GATE].format == format


@pytest.mark.parametrize(("make", "options", "settings", "why"), DENSE)
def test_what_no_format_holds_is_dequantized_and_said_once(
    make: Callable[..., packers.Module], options: dict[str, Any], settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    folder, expected = packers.folder(tmp_path, make, settings, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_checkpoint(folder) as checkpoint:
            found = {name: checkpoint.read(name) for name in expected}
    assert all(found[name].format == "float32" and torch.equal(found[name].data, meant) for name, meant in expected.items())
    (warning,) = caught
    assert re.search(f"config.json: .*{why}.* dequantized to float32", str(warning.message))


def test_a_model_of_packed_weights_is_that_of_their_values(tmp_path: Path) -> None:
    packed, expected = packers.folder(tmp_path / "packed", packers.pack_quantized, compressed(), zero=True)
    dense, _ = packers.folder(tmp_path / "dense", None, None)
    save_file(expected, dense / "model.safetensors")
    ids = tiny.prompts(2, 7)
    found, wanted = (GraniteForCausalLM.from_pretrained(folder, device="cpu")(ids).logits for folder in (packed, dense))
    assert tiny.spread_error(found, wanted) < 1e-6


@pytest.mark.parametrize(
    ("make", "options", "settings", "told", "format"),
    [
        (packers.gptq, {}, gptq(sym=False), "int4_g64_zero", "int4_g64"),  # the zero points are all in the middle
        (packers.pack_quantized, {"bits": 8, "scale": 1 + 2**-20}, compressed(bits=8), "q8_0", "dense"),  # no float16
    ],
)
def test_what_reading_shows_counts_where_weights_stay_packed(
    make: Callable[..., packers.Module], options: dict[str, Any], settings: dict[str, Any], told: str, format: str, tmp_path: Path
) -> None:
    folder, expected = packers.folder(tmp_path, make, settings, **options)
    with open_checkpoint(folder) as checkpoint, warnings.catch_warnings(action="ignore"):
        assert checkpoint.tensors[GATE].format == told
        packed = {name: info.format for name, info in checkpoint.tensors.items() if info.packed}
        weight = Loader(checkpoint, torch.float32, torch.device("cpu"), formats=packed).weight(GATE)
    assert weight.formats == (format,)
    assert torch.equal(dense_matrix(weight.parts[0], torch.float32), expected[GATE])


def test_activations_stay_and_it_is_said(tmp_path: Path) -> None:
    settings = compressed("float-quantized", kind="float", bits=8, kv_cache_scheme={"num_bits": 8, "type": "float"})
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True}
    folder, _ = packers.folder(tmp_path, packers.float_quantized, settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_checkpoint(folder).close()
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2 and "quantized activations; they stay" in told[0] and "KV cache" in told[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (compressed("nvfp4-pack-quantized"), "the format 'nvfp4-pack-quantized'; expected one of pack-quantized"),
        (compressed(bits=2), "weights of type 'int' with 2 bits in group_0; expected int with 4 or 8 bits"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights aren't supported"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "config_groups"),
        (gptq(3), "3 bits; expected 4 or 8"),
        (gptq(checkpoint_format="marlin"), "the checkpoint_format 'marlin'; expected gptq or gptq_v2"),
        ({**AWQ, "version": "gemv"}, "'gemv'; expected 4 bits in gemm"),
        ({"quant_method": "hqq"}, "the method 'hqq'; expected compressed-tensors, gptq, awq"),
        ("int4", "the method None"),
    ],
)
def test_other_schemes_are_refused_by_name(settings: Any, said: str, tmp_path: Path) -> None:
    folder, _ = packers.folder(tmp_path, packers.pack_quantized, settings)
    with pytest.raises(GraniteError) as error:
        open_checkpoint(folder)
    assert said in str(error.value) and "config.json" in str(error.value) and "\n" not in str(error.value)


def refused(folder: Path, name: str, tensor: torch.Tensor | None) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / "model.safetensors")
    with pytest.raises(GraniteError) as error, open_checkpoint(folder) as checkpoint:
        checkpoint.read(DOWN)
    return str(error.value)


def test_damaged_modules_are_refused_with_the_tensor_named(tmp_path: Path) -> None:
    module = DOWN.removesuffix("weight")
    for number, (make, settings, kind, tensor, said) in enumerate(
        [
            (packers.pack_quantized, compressed(), "weight_scale", None, "its weight_scale is missing"),
            (
                packers.pack_quantized,
                compressed(),
                "weight_shape",
                torch.tensor([256, 128]),
                "weight_packed has the shape [256, 24]; expected",
            ),
            (packers.pack_quantized, compressed(), "weight_scale", torch.ones(256, 5), "5 groups; expected a divisor of 192"),
            (packers.pack_quantized, compressed(), "weight_scale", torch.full((256, 3), float("nan")), "weight_scale has 768 NaN"),
            (packers.pack_quantized, compressed(), "weight_packed", torch.zeros(256, 24), "weight_packed has the type float32 and"),
            (packers.pack_quantized, compressed(), "weight_shape", torch.tensor(256), "weight_shape has the shape []; expected [2]"),
            (
                packers.gptq,
                gptq(),
                "qzeros",
                torch.zeros(3, 32, dtype=torch.uint8),
                "qzeros has the type u8 and the shape [3, 32]",
            ),
            (packers.gptq, gptq(), "scales", None, "no scales and qzeros"),
            (packers.gptq, gptq(), "qzeros", torch.zeros(3, 5, dtype=torch.int32), "qzeros has the shape [3, 5]; expected [3, 32]"),
            (
                packers.gptq,
                gptq(),
                "g_idx",
                torch.full((192,), 7, dtype=torch.int32),
                "the g_idx of model.layers.0.mlp.down_proj.weight names groups out of 0 .. 2",
            ),
            (packers.gptq, gptq(), "bias", torch.ones(256), "a module with a bias"),
        ]
    ):
        folder, _ = packers.folder(tmp_path / str(number), make, settings)
        message = refused(folder, module + kind, tensor)
        assert said in message and "\n" not in message


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_of_eight_bit_floats_that_are_no_number_are_refused(code: int, tmp_path: Path) -> None:
    """The kernels have no NaN among such weights."""
    folder, _ = packers.folder(tmp_path, packers.float_quantized, compressed("float-quantized", kind="float", bits=8))
    codes = load_file(folder / "model.safetensors")[DOWN]
    codes.view(torch.uint8)[3, 5] = code
    message = refused(folder, DOWN, codes)
    assert re.search(rf"model.safetensors: {re.escape(DOWN)} has 1 NaN or infinite values of 49,152; expected none", message)


def test_settings_beside_the_configuration_are_found(tmp_path: Path) -> None:
    folder, expected = packers.folder(tmp_path, packers.gptq, None)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": False, "sym": True}))
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(values(checkpoint.read(DOWN), torch.float32), expected[DOWN])
