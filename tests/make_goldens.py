"""What llama.cpp makes of fixed weights: writes tests/data/llama_cpp.npz and tests/data/llama_cpp.json.

    python -m venv VENV && VENV/bin/pip install llama-cpp-python==0.3.36
    python tests/make_goldens.py tests/data --llama VENV/bin/python

Run it where the package and its tests are importable; llama.cpp (built from PyPI's sources, which takes a while) is called in the
other environment. The weights come from NumPy's generators, so that a test makes them again, and no model is stored:

    blocks of all ten types as ggml_quantize_chunk writes them, and their relative errors on larger matrices
    the type of each tensor of tiny Granites that llama_model_quantize has made Q4_K_M of
    the logits of tiny Granites at the last of IDS: in float32; of packed files, where llama.cpp rounds activations to 8 bits before
    each product; and, without that, of their values in float32 ("rounded")
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14}  # GGML_TYPE_*
QUANTIZATIONS = ("q8_0", "q6_k", "q4_k_m")
SPREADS: dict[str, tuple[int, dict[int, float], float]] = {  # bytes of a block, its float16 fields, deviation of random codes and scales
    "q8_0": (34, {0: 1.0}, 74.0),
    "q4_k": (144, {0: 1.0, 2: 7.5}, 258.0),
    "q6_k": (210, {208: 1.0}, 1369.0),
}
Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
KINDS = ("normal", "heavy")
IDS = [7, 301, 12, 488, 99, 5, 260, 41, 333, 18, 76, 402]
GRANITE: dict[str, Any] = {
    "model_type": "granite",
    "architectures": ["GraniteForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 1 / 64,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
MIXTURE = GRANITE | {
    "model_type": "granitemoe",
    "architectures": ["GraniteMoeForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
MODELS = {"granite": GRANITE, "granitemoe": MIXTURE}
DEEP = {"granite": 17, "granitemoe": 9}  # layers where llama.cpp's choice of types shows


def matrix(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Weights float32: Gaussian, or heavy-tailed (Student's t with four degrees of freedom)."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((rows, columns)) if kind == "normal" else rng.standard_t(4, (rows, columns))
    return (0.02 * drawn).astype(np.float32)


def granite(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of transformers' names with weights from a generator, and a tokenizer, since llama.cpp wants one."""
    import torch
    from granite_kernels.model.checkpoint.layout import expected_tensors
    from safetensors.torch import save_file

    from granite_kernels import GraniteConfig
    from tests import tokenizer_cases

    tokenizer_cases.make_folder(folder)
    tensors = {}
    for seed, (name, expected) in enumerate(expected_tensors(GraniteConfig.from_dict(config)).items()):
        drawn = np.random.default_rng(seed).standard_normal(expected.shape).astype(np.float32)
        gain = 4.0 if "q_proj" in name or "k_proj" in name else 1.5
        scale = np.float32(0.3 if "embed" in name else gain / expected.shape[-1] ** 0.5)
        tensors[name] = torch.from_numpy(1 + np.float32(0.2) * drawn if drawn.ndim == 1 else drawn * scale)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------ in llama.cpp's environment


def _quantized(weights: np.ndarray, kind: int) -> np.ndarray:
    """The rows' blocks, uint8 [rows, row_bytes], as llama.cpp writes them."""
    from llama_cpp._ggml import libggml as ggml  # the library below the bindings

    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows, columns = weights.shape
    blocks = np.zeros((rows, ggml.ggml_row_size(kind, columns)), np.uint8)
    written = ggml.ggml_quantize_chunk(kind, weights.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    assert written == blocks.nbytes
    return blocks


def _logits(path: Path) -> np.ndarray:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False)
    model.eval(IDS)
    return np.array(model.scores[len(IDS) - 1], np.float32)  # of the last position


def _requantized(source: Path, target: Path, kind: int) -> dict[str, str]:
    import gguf
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = kind, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)) == 0
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(target).tensors}


def inside(folder: Path) -> None:
    """Everything that needs llama.cpp: reads and writes files in `folder`."""
    import gguf

    arrays: dict[str, np.ndarray] = {}
    told: dict[str, Any] = {"errors": {}, "types": {}}
    small = matrix("heavy", 4, 512)
    small[0, :64], small[1, :256], small[2, 3] = 0.0, 0.01, 1.0  # zeros, equal weights, one that stands out
    for name, kind in TYPES.items():
        arrays[f"blocks/{name}"] = _quantized(small, kind)
        for shape in KINDS:
            weights = matrix(shape, 32, 1024)
            values = gguf.quants.dequantize(_quantized(weights, kind), gguf.GGMLQuantizationType(kind))
            told["errors"][f"{name}/{shape}"] = float(np.linalg.norm(values - weights) / np.linalg.norm(weights))
    for path in sorted(folder.glob("logits/*.gguf")):
        arrays[f"logits/{path.stem}"] = _logits(path)
    for path in sorted(folder.glob("written/*.gguf")):
        assert np.isfinite(_logits(path)).all(), path  # llama.cpp reads what `granite-kernels quantize` writes
    for path in sorted(folder.glob("deep/*.gguf")):
        told["types"][path.stem] = _requantized(path, folder / "requantized.gguf", Q4_K_M)
    np.savez_compressed(folder / "goldens.npz", **arrays)
    (folder / "goldens.json").write_text(json.dumps(told))
    print(*sorted(arrays))


# ------------------------------------------------------------------ in the package's


def drawn(source: Path, quantization: str, path: Path) -> Path:
    """A GGUF like that of `source` quantized, its blocks drawn from a generator, so that no quantizer has a say in them."""
    import torch
    from granite_kernels.model.checkpoint import open_checkpoint
    from granite_kernels.model.quantization import plan
    from granite_kernels.model.write_gguf import Entry, quantized, write_gguf

    def content(entry: Entry) -> torch.Tensor:
        if entry.format not in SPREADS:
            return quantized(checkpoint, entry, torch.device("cpu"))
        return torch.from_numpy(blocks(entry.name, entry.format, entry.shape, entry.row_bytes))

    with open_checkpoint(source) as checkpoint:
        chosen = plan(checkpoint.tensors, checkpoint.config.num_hidden_layers, quantization, source)
        write_gguf(checkpoint, chosen, quantization, path, content, lambda name: None)
    return path


def blocks(name: str, format: str, shape: tuple[int, ...], row_bytes: int) -> np.ndarray:
    """Random codes and scales, uint8 [..., row_bytes], of values with about the standard deviation of `granite`'s."""
    size, halves, spread = SPREADS[format]
    data = np.random.default_rng([*name.encode()]).integers(0, 256, (*shape[:-1], row_bytes // size, size), dtype=np.uint8)
    deviation = 0.3 if "embd" in name else 1.5 / shape[-1] ** 0.5
    for place, factor in halves.items():
        data[..., place : place + 2] = np.array([factor * deviation / spread], np.float16).view(np.uint8)
    return data.reshape(*shape[:-1], row_bytes)


def plain(source: Path, path: Path) -> Path:
    """`source`, a folder or a packed GGUF, as a GGUF of its values in float32."""
    import gguf
    import torch
    from granite_kernels.model.checkpoint import open_checkpoint
    from granite_kernels.model.write_gguf import Entry, quantized, write_gguf

    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors} if source.is_file() else {}

    def content(entry: Entry) -> torch.Tensor:
        if entry.name not in packed:
            return quantized(checkpoint, entry, torch.device("cpu"))
        return torch.from_numpy(gguf.quants.dequantize(packed[entry.name].data, packed[entry.name].tensor_type).copy())

    with open_checkpoint(source) as checkpoint:
        checkpoint.tensors = {name: dataclasses.replace(info, format="float32") for name, info in checkpoint.tensors.items()}
        write_gguf(checkpoint, {}, None, path, content, lambda name: None)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--llama", help="the Python in whose environment llama-cpp-python is")
    arguments = parser.parse_args()
    if not arguments.llama:
        inside(arguments.output)
        return
    from granite_kernels.model.cli_quantize import write

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind in ("logits", "written", "deep"):
            (folder / kind).mkdir()
        for name, config in MODELS.items():
            source = granite(folder / name, config)
            plain(source, folder / "logits" / f"{name}-f32.gguf")
            for quantization in QUANTIZATIONS:
                packed = drawn(source, quantization, folder / "logits" / f"{name}-{quantization}.gguf")
                plain(packed, folder / "logits" / f"{name}-{quantization}-rounded.gguf")
                written = write(source, quantization, folder / "new" / name / quantization, "cpu")
                written.rename(folder / "written" / f"{name}-{quantization}.gguf")
            deep = granite(folder / f"deep-{name}", {**config, "num_hidden_layers": DEEP[name]})
            plain(deep, folder / "deep" / f"{name}.gguf")
        subprocess.run([arguments.llama, __file__, str(folder)], check=True, env={"PYTHONPATH": ""})
        arguments.output.mkdir(exist_ok=True)
        for kind in ("npz", "json"):
            (folder / f"goldens.{kind}").rename(arguments.output / f"llama_cpp.{kind}")


if __name__ == "__main__":
    sys.exit(main())
