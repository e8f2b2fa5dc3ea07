"""`granite-kernels quantize`: files that load again with the same bits, as others lay them out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from granite_kernels.model import cli
from granite_kernels.model.checkpoint import open_checkpoint
from granite_kernels.model.cli_quantize import write
from granite_kernels.model.packing import pack
from granite_kernels.model.quantization import plan
from granite_kernels.model.tokenizer import Tokenizer, load_tokenizer
from granite_kernels.model.write_safetensors import write_safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from granite_kernels import GraniteForCausalLM
from granite_kernels.errors import GraniteError
from tests import packers, tiny, tiny_gguf, tokenizer_cases

CPU = torch.device("cpu")


def quantized(source: Path, quantization: str) -> dict[str, tuple[Tensor, ...]]:
    """The planes of each matrix as loading with `quantization` makes them; the values of what stays dense."""
    with open_checkpoint(source) as checkpoint:
        chosen = plan(checkpoint.tensors, checkpoint.config.num_hidden_layers, quantization, source)
        return {
            name: pack(checkpoint.read(name), chosen.get(name), torch.float32, CPU).planes
            for name in checkpoint.tensors
            if "norm" not in name
        }


def stored(result: Path) -> dict[str, tuple[Tensor, ...]]:
    with open_checkpoint(result) as checkpoint:
        return {name: pack(checkpoint.read(name), None, torch.float32, CPU).planes for name in checkpoint.tensors if "norm" not in name}


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("quantization", ["q8_0", "q6_k", "q4_k_m"])
def test_a_gguf_loads_with_the_same_bits(quantization: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.make(intermediate_size=256).to(torch.bfloat16), tmp_path / "source")
    result = write(source, quantization, tmp_path / "out", "cpu")
    assert result == tmp_path / "out" / f"source-{quantization.upper()}.gguf"
    wanted, found = quantized(source, quantization), stored(result)
    assert wanted.keys() == found.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)
    ids = tiny.prompts(1, 6)
    models = [
        GraniteForCausalLM.from_pretrained(path, device="cpu", dtype=torch.float32, **options)
        for path, options in ((source, {"quantization": quantization}), (result, {}))
    ]
    assert models[0].config.embedding_multiplier == models[1].config.embedding_multiplier == 12.0
    assert tiny.spread_error(models[1](ids).logits, models[0](ids).logits) < 1e-6


@pytest.mark.parametrize("kind", ["granitemoe", "granitemoeshared", "llama"])
def test_mixtures_and_llamas_become_gguf_too(kind: str, tmp_path: Path) -> None:
    extra = {"shared_intermediate_size": 64} if kind == "granitemoeshared" else {}
    source = tiny.save(tiny.make(kind, **extra), tmp_path / "source")
    result = write(source, "q8_0", tmp_path / "out", "cpu")
    wanted, found = quantized(source, "q8_0"), stored(result)
    for name, planes in wanted.items():
        if not name.endswith("input_linear.weight"):
            assert same(found[name], planes), name
    with open_checkpoint(source) as theirs, open_checkpoint(result) as ours:
        fields = set(theirs.config.to_dict()) - {"dtype", "eos_token_id", "bos_token_id", "pad_token_id"}
        assert {name: theirs.config.to_dict()[name] for name in fields} == {name: ours.config.to_dict()[name] for name in fields}
    ids = tiny.prompts(1, 6)
    models = [
        GraniteForCausalLM.from_pretrained(path, device="cpu", dtype=torch.float32, **options)
        for path, options in ((source, {"quantization": "q8_0"}), (result, {}))
    ]
    assert tiny.spread_error(models[1](ids).logits, models[0](ids).logits) < 1e-6


def test_the_gguf_is_as_the_gguf_library_reads_it(tmp_path: Path) -> None:
    model = tiny.make(intermediate_size=256)
    source = tiny.save(model, tmp_path / "source")
    reader = gguf.GGUFReader(write(source, "q4_k_m", tmp_path / "out", "cpu"))
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q6_K
    assert found["blk.0.ffn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    query = found["blk.0.attn_q.weight"]
    values = gguf.quants.dequantize(query.data, query.tensor_type)
    exact = tiny_gguf.permute(model.model.layers[0].self_attn.q_proj.weight.detach().numpy(), 4)
    assert np.linalg.norm(values - exact) < 0.1 * np.linalg.norm(exact)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    source = tokenizer_cases.make_folder(tiny.save(tiny.make(vocab_size=512), tmp_path / "source"))
    with open_checkpoint(source) as checkpoint:
        theirs = load_tokenizer(checkpoint)
    with open_checkpoint(write(source, "q8_0", tmp_path / "gguf", "cpu")) as checkpoint:
        ours = load_tokenizer(checkpoint)
    folder = Tokenizer.from_folder(write(source, "int8", tmp_path / "folder", "cpu"))
    assert theirs is not None and ours is not None
    assert theirs.eos_token_id == ours.eos_token_id == folder.eos_token_id
    assert theirs.special_ids == ours.special_ids
    messages = [{"role": "user", "content": "Hi, 2 < 3"}]
    for text in tokenizer_cases.NASTY:
        assert theirs.encode(text) == ours.encode(text) == folder.encode(text), text
    assert theirs.apply_chat_template(messages) == ours.apply_chat_template(messages)


def test_a_tokenizer_that_gguf_has_no_words_for_is_left_out_and_it_is_said(tmp_path: Path) -> None:
    source = tokenizer_cases.make_folder(tiny.save(tiny.make(vocab_size=512), tmp_path / "source"))
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="no words for its tokenizer.json"):
        result = write(source, "q8_0", tmp_path / "out", "cpu")
    with open_checkpoint(result) as checkpoint:
        assert load_tokenizer(checkpoint) is None


@pytest.mark.parametrize("kind", ["granite", "granitemoe"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_folder_loads_with_the_same_bits(quantization: str, kind: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.make(kind, intermediate_size=192).to(torch.bfloat16), tmp_path / "source")
    result = write(source, quantization, tmp_path / "out", "cpu")
    wanted, found = quantized(source, quantization), stored(result)
    assert wanted.keys() == found.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)


def test_the_folder_is_laid_out_as_compressed_tensors_has_it(tmp_path: Path) -> None:
    source = tiny.save(tiny.make(), tmp_path / "source")
    result = write(source, "int4", tmp_path / "out", "cpu")
    module = "model.layers.0.self_attn.k_proj"
    tensors = load_file(result / "model.safetensors")
    with open_checkpoint(result) as checkpoint:
        read = checkpoint.read(f"{module}.weight")
    assert torch.equal(tensors[f"{module}.weight_packed"], packers.words(read.data.numpy(), 4))
    assert torch.equal(tensors[f"{module}.weight_scale"], read.metadata[0])
    assert tensors[f"{module}.weight_shape"].tolist() == [64, 256]
    embedding = "model.embed_tokens.weight"  # dense, as no other reader takes a packed one; its rounding is repeated
    assert torch.equal(tensors[embedding], load_file(source / "model.safetensors")[embedding])
    config = json.loads((result / "config.json").read_text())
    assert config["granite_kernels_int8"] == [embedding] and config["quantization_config"]["ignore"] == ["model.embed_tokens", "lm_head"]
    groups = config["quantization_config"]["config_groups"]
    told = {tuple(group["targets"]): (group["weights"]["num_bits"], group["weights"]["group_size"]) for group in groups.values()}
    assert told[("Linear",)] == (4, 128)
    assert told[("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")] == (4, 64)  # 192 columns


def test_an_untied_head_is_packed_in_eight_bits(tmp_path: Path) -> None:
    source = tiny.save(tiny.make(tie_word_embeddings=False), tmp_path / "source")
    result = write(source, "int4", tmp_path / "out", "cpu")
    wanted, found = quantized(source, "int4"), stored(result)
    assert all(same(found[name], wanted[name]) for name in wanted)
    settings = json.loads((result / "config.json").read_text())["quantization_config"]
    told = {tuple(group["targets"]): group["weights"]["num_bits"] for group in settings["config_groups"].values()}
    assert told[("lm_head",)] == 8 and settings["ignore"] == ["model.embed_tokens"]


def test_large_checkpoints_are_cut_into_shards(tmp_path: Path) -> None:
    source = tiny.save(tiny.make(), tmp_path / "source")
    (tmp_path / "out").mkdir()
    with open_checkpoint(source) as checkpoint:
        chosen = plan(checkpoint.tensors, 2, "int8", source)
        write_safetensors(checkpoint, chosen, tmp_path / "out", CPU, lambda name: None, shard=200_000)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    wanted, found = quantized(source, "int8"), stored(tmp_path / "out")
    assert all(same(found[name], wanted[name]) for name in wanted)


def test_the_verb_says_what_it_wrote_and_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.save(tiny.make(), tmp_path / "source")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.guarded(lambda: cli.cli.main(["quantize", *arguments], prog_name="granite-kernels", standalone_mode=False))
        return code, *capsys.readouterr()

    code, out, _ = call(str(source), "--format", "q8_0", "--output", str(tmp_path / "out"))
    path = tmp_path / "out" / "source-Q8_0.gguf"
    assert code == 0 and re.fullmatch(rf"{path}  \({path.stat().st_size:,} bytes, [\d.]+ s\)\n", out)
    for arguments, said in (
        ((str(source), "--format", "q8_0", "--output", str(tmp_path / "out")), "is there already"),
        ((str(source), "--format", "q9", "--output", str(tmp_path / "other")), "quantization is 'q9', expected"),
        ((str(path), "--format", "q8_0", "--output", str(tmp_path / "other")), "already packed (q8_0)"),
        (("random:3.1-2b", "--format", "q8_0", "--output", str(tmp_path / "other")), "random weights"),
    ):
        code, out, err = call(*arguments)
        assert code == 2 and said in err and err.count("\n") == 1 and not out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "source"]


def test_a_gguf_in_sixteen_bits_keeps_its_tokenizer_and_becomes_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_gguf.write(tiny.make(), path, "F16")
    wanted, found = quantized(path, "q6_k"), stored(write(path, "q6_k", tmp_path / "out", "cpu"))
    assert all(same(found[name], wanted[name]) for name in wanted)
    with pytest.raises(GraniteError, match="int4 is written for folders of safetensors; expected q8_0, q6_k, q4_k_m for a GGUF"):
        write(path, "int4", tmp_path / "other", "cpu")


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tiny.save(tiny.make(), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors")
    for quantization in ("q8_0", "int4"):
        with pytest.raises(GraniteError, match="NaN"):
            write(source, quantization, tmp_path / "out", "cpu")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
