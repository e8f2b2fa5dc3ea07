"""Safetensors: what transformers saves is read to the bit, and what is damaged or hostile is refused by name."""

from __future__ import annotations

import json
import os
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
from granite_kernels.model.checkpoint import Checkpoint, hub, open_checkpoint
from granite_kernels.model.checkpoint.finite import count_non_finite
from safetensors.torch import load_file, save_file

from granite_kernels.errors import GraniteError
from tests import tiny

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tiny.make(), tmp_path / "model")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tiny.save(tiny.make(), tmp_path / "shards", sharded=True)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path, **options: Any) -> str:
    started = time.monotonic()
    with pytest.raises(GraniteError) as error:
        open_checkpoint(folder, **options)
    assert time.monotonic() - started < 5
    message = str(error.value)
    assert "\n" not in message
    return message


def contents(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    with checkpoint:
        return {name: checkpoint.read(name).data for name in checkpoint.tensors}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["granite", "granitemoe", "granitemoeshared", "llama"])
def test_what_transformers_saves_is_read_to_the_bit(kind: str, sharded: bool, tmp_path: Path) -> None:
    extra = {"shared_intermediate_size": 48} if kind == "granitemoeshared" else {}
    folder = tiny.save(tiny.make(kind, **extra).to(torch.bfloat16), tmp_path, sharded=sharded)
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    with warnings.catch_warnings(action="error"):
        checkpoint = open_checkpoint(folder)
    found = contents(checkpoint)  # the tensors outlive the checkpoint
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (checkpoint.kind, checkpoint.config.dtype, checkpoint.packed) == ("safetensors", torch.bfloat16, False)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())


def test_an_untied_head_is_needed_and_a_redundant_one_is_not(tmp_path: Path) -> None:
    untied = tiny.save(tiny.make(tie_word_embeddings=False), tmp_path / "untied")
    assert "lm_head.weight" in open_checkpoint(untied).tensors
    edit(untied, lambda tensors: tensors.pop("lm_head.weight"))
    assert "1 of 21 expected tensors are missing: lm_head.weight" in refusal(untied)
    tied = tiny.save(tiny.make(), tmp_path / "tied")
    edit(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    with warnings.catch_warnings(action="error"):
        assert "lm_head.weight" not in open_checkpoint(tied).tensors


def test_the_names_of_a_mixture_in_memory_are_understood(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make("granitemoe"), tmp_path)
    spellings = {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    }

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            prefix, mark, stem = name.partition("block_sparse_moe.")
            if mark:
                tensors[prefix + mark + spellings[stem]] = tensors.pop(name)

    expected = contents(open_checkpoint(folder))
    edit(folder, rename)
    found = contents(open_checkpoint(folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_end_tokens_of_the_generation_config_are_added(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[0, 7])
    assert open_checkpoint(folder).config.eos_token_id == (0, 7)
    edit_json(folder / "generation_config.json", eos_token_id=tiny.VOCAB)
    assert "generation_config.json: eos_token_id is 301; expected an integer from 0 to 300" in refusal(folder)


def test_a_config_without_dtype_takes_that_of_the_embedding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    edit(folder, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    assert open_checkpoint(folder).config.dtype == torch.float16


def test_tokenizer_files_are_listed(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (folder / name).write_text("{}")
    names = [file.name for file in open_checkpoint(folder).tokenizer_files]
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


# safetensors that are damaged or hostile


def entry(start: int, end: int, elements: int = 2, dtype: str = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [elements], "data_offsets": [start, end]}


def packed(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


DAMAGED = {
    "empty": b"",
    "seven bytes": b"7 bytes",
    "header of 2^64 - 1": packed({}, length=2**64 - 1),
    "header over 100 MB": packed({}, length=10**8 + 1),
    "header over the file": packed({}, length=200),
    "bad JSON": packed(b'{"a": '),
    "nested JSON": packed(b"[" * 100_000),
    "header that isn't UTF-8": packed(b'{"\xff": 1}'),
    "overlapping": packed({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "reversed": packed({"a": entry(4, 0)}, bytes(4)),
    "holed": packed({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "trailing bytes": packed({"a": entry(0, 4)}, bytes(5)),
    "truncated": packed({"a": entry(0, 4)}, bytes(3)),
    "shape that overflows": packed({"a": {**entry(0, 4), "shape": [2**63, 2**62]}}, bytes(4)),
    "negative dimension": packed({"a": {**entry(0, 4), "shape": [-2]}}, bytes(4)),
    "unknown dtype": packed({"a": entry(0, 4, dtype="F99")}, bytes(4)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_safetensors_get_the_librarys_error_with_name_and_size(case: str, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(DAMAGED[case])
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert f"{len(DAMAGED[case]):,} bytes" in message
    assert "Error while deserializing header" in message


def test_repeated_keys_are_refused(folder: Path) -> None:
    one = json.dumps({"a": entry(0, 4)})[1:-1]
    (folder / WEIGHTS).write_bytes(packed(f"{{{one},{one}}}".encode(), bytes(4)))
    assert "the key 'a' twice" in refusal(folder)


def test_names_cannot_break_the_line(folder: Path, shards: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"a\nb": torch.ones(1)}))
    assert r"holds a tensor named 'a\nb'" in refusal(folder)
    point(shards, "model-00001-of-00003.safetensors", "a\nb")
    assert r"'a\nb' is said to be in" in refusal(shards)


def test_all_missing_tensors_are_listed(folder: Path) -> None:
    edit(folder, lambda tensors: [tensors.pop(name) for name in (Q_PROJ, NORM, "model.norm.weight")])
    message = refusal(folder)
    assert f"3 of 20 expected tensors are missing: {NORM}, {Q_PROJ}, model.norm.weight" in message


def test_extra_tensors_are_a_warning(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    with pytest.warns(UserWarning, match=r"ignoring 1 tensors .*: model\.layers\.0\.self_attn\.rotary_emb\.inv_freq"):
        checkpoint = open_checkpoint(folder)
    assert len(checkpoint.tensors) == 20


def test_a_wrong_shape_is_held_against_the_configuration(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:-1].clone()}))
    message = refusal(folder)
    assert f"{Q_PROJ} has the shape [255, 256]; expected [256, 256], as the configuration implies" in message
    assert "(num_attention_heads * head_dim, hidden_size)" in message


def test_a_wrong_type_is_refused(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int8)}))
    assert f"{NORM} has the type i8; expected float32, float16, bfloat16" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_search_finds_one_bad_value_anywhere(dtype: torch.dtype, value: float) -> None:
    largest = torch.finfo(dtype).max
    data = torch.full((3, 1009), largest, dtype=dtype)  # the largest finite values, of both signs, are no reason to refuse
    data[1] = -largest
    assert count_non_finite(data) == 0
    for place in (0, 1, 7, 8, 15, 16, 31, 63, 100, 1008, 1009, 2000, 3026):
        damaged = data.clone()
        damaged.view(-1)[place] = value
        assert count_non_finite(damaged) == 1


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_bad_values_are_found_by_name_and_can_be_let_pass(value: float, folder: Path) -> None:
    edit(folder, lambda tensors: tensors[Q_PROJ][3, 5:7].fill_(value))
    checkpoint = open_checkpoint(folder)
    checkpoint.read(NORM)
    with pytest.raises(GraniteError, match=f"{WEIGHTS}: {Q_PROJ} has 2 NaN or infinite values of 65,536; expected none"):
        checkpoint.read(Q_PROJ)
    assert not open_checkpoint(folder, check_finite=False).read(Q_PROJ).data.isfinite().all()


# the index


def point(folder: Path, file: object, tensor: str = NORM) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={**weight_map, tensor: file})


HOSTILE_NAMES = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "sub/x.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    "x\0.safetensors",
    "x.bin",
    ".safetensors/..",
    "",
    5,
    None,
    ["x"],
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_the_index_names_only_safetensors_of_its_folder(name: object, shards: Path) -> None:
    (shards.parent / "x.safetensors").write_bytes(b"outside")
    point(shards, name)
    message = refusal(shards)
    assert str(shards / INDEX) in message
    assert NORM in message
    assert "expected the name of a .safetensors file in the same folder" in message


def test_links_out_of_the_folder_are_refused_but_for_a_hub_cache(shards: Path, tmp_path: Path) -> None:
    first = sorted(shards.glob("*.safetensors"))[0]
    outside = tmp_path / "blobs" / "abc"
    outside.parent.mkdir()
    first.rename(outside)
    first.symlink_to(outside)
    assert f"{first.name} is a link to {outside}" in refusal(shards)
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.parent.mkdir()
    shards.rename(snapshot)
    assert open_checkpoint(snapshot).config.vocab_size == tiny.VOCAB
    (snapshot / first.name).unlink()
    (snapshot / first.name).symlink_to(tmp_path / "elsewhere")
    outside.rename(tmp_path / "elsewhere")
    assert "is a link to" in refusal(snapshot)


def test_a_loop_of_links_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    assert f"{folder / WEIGHTS}: can't be followed" in refusal(folder)


def test_missing_shards_are_listed(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    for file in files[:2]:
        file.unlink()
    assert f"names files that aren't there: {files[0].name}, {files[1].name}" in refusal(shards)


def test_index_and_shards_must_agree(shards: Path) -> None:
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    file = weight_map.pop(NORM)
    edit_json(shards / INDEX, weight_map=weight_map)
    assert f"{file}: holds {NORM}, which the index doesn't list" in refusal(shards)
    edit_json(shards / INDEX, weight_map={**weight_map, NORM: file, "ghost.weight": file})
    assert f"{file}: lacks ghost.weight" in refusal(shards)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(weight_map: object, shards: Path) -> None:
    edit_json(shards / INDEX, weight_map=weight_map)
    assert f"{INDEX}: weight_map is" in refusal(shards)


def test_shards_without_their_index_are_refused(shards: Path) -> None:
    (shards / INDEX).unlink()
    assert f".safetensors files and no {INDEX}" in refusal(shards)


# the folder and its JSON

BAD_JSON = {
    "truncated": b'{"model_type": "gran',
    "empty": b"",
    "a list": b"[1, 2]",
    "nested": b"[" * 1_000_000,
    "no UTF-8": b'{"model_type": "\xff\xfe"}',
    "a number of 5,000 digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_config_that_is_no_json_object_is_refused(case: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(BAD_JSON[case])
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert "not valid JSON" in message or "expected a JSON object" in message


def test_a_config_over_the_limit_is_not_even_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as stream:
        stream.truncate(1 << 40)  # sparse
    assert "config.json: has 1,099,511,627,776 bytes; expected JSON of at most" in refusal(folder)


def test_a_missing_config_is_said(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert f"{folder / 'config.json'}: no such file" in refusal(folder)


def test_a_config_is_checked_with_its_file_named(folder: Path) -> None:
    edit_json(folder / "config.json", num_key_value_heads=3)
    assert refusal(folder).startswith(f"{folder / 'config.json'}: num_attention_heads is 4; expected a multiple of")


def test_quantized_safetensors_are_refused_with_what_is_supported(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "method 'bitsandbytes'; expected compressed-tensors, gptq, awq, or float32, float16, bfloat16 weights" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(name: str, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "convert" in refusal(folder)
    assert name in refusal(folder)
    assert "convert the checkpoint to safetensors" in refusal(folder / name)


def test_folders_and_files_of_something_else(folder: Path, tmp_path: Path) -> None:
    assert "give its folder" in refusal(folder / WEIGHTS)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no weights; expected config.json" in refusal(empty)
    (empty / "some.gguf").write_bytes(b"GGUF")
    assert "give the path of one .gguf file" in refusal(empty)
    (empty / "notes.txt").write_text("hello")
    assert "not a checkpoint" in refusal(empty / "notes.txt")
    os.mkfifo(empty / "pipe")
    assert "neither a file nor a folder" in refusal(empty / "pipe")  # and doesn't wait for a writer


# the hub


@pytest.mark.parametrize(
    "source",
    ["", "nowhere", "no/such/folder", "./no/folder", "no/model.gguf", "no/model.safetensors", "a" * 5000, "a\0b"],
)
def test_a_path_that_is_not_there_is_no_hub_id(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(GraniteError, match=r"expected|not a hub id"):
        open_checkpoint(source)


def cache(folder: Path, root: Path) -> Path:
    """`folder` as the hub's cache keeps the revision main of owner/name; returns the snapshot."""
    commit = "0" * 40
    repository = root / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    for path in (repository / "blobs", snapshot, repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_cached_repository_is_used_without_the_network(shards: Path, tmp_path: Path) -> None:
    expected = contents(open_checkpoint(shards))
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    cache(shards, tmp_path / "hub")
    checkpoint = open_checkpoint("owner/name", cache_dir=tmp_path / "hub", local_files_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in contents(checkpoint).items())


def test_an_incomplete_snapshot_is_downloaded_again(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache(shards, tmp_path / "hub")
    shard = sorted(snapshot.glob("*.safetensors"))[0]
    target = shard.readlink()
    shard.unlink()
    asked = []

    def download(repo: str, *, local_files_only: bool, **options: Any) -> str:
        asked.append(local_files_only)
        if not local_files_only:
            shard.symlink_to(target)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(open_checkpoint("owner/name", cache_dir=tmp_path / "hub").tensors) == 20
    assert asked == [True, False]


def test_only_configuration_tokenizer_and_safetensors_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    unwanted = [
        "pytorch_model.bin",
        "model.gguf",
        "modeling.py",
        "README.md",
        "onnx/model.safetensors",
        "original/params.json",
    ]

    def download(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str], **options: Any) -> str:
        files = [*published, *unwanted]
        kept = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(kept) == published
        assert (options["revision"], options["token"]) == ("v1", "secret")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("owner/name", revision="v1", token="secret").path == folder


@pytest.mark.parametrize(("offline", "reason"), [(True, "local_files_only forbids"), (False, "HF_HUB_OFFLINE forbids")])
def test_offline_and_not_cached(offline: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(GraniteError, match=f"owner/name: .*not complete in the cache .*{reason} downloading"):
        open_checkpoint("owner/name", cache_dir=tmp_path, local_files_only=offline)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, "no such repository on the hub"),
        (huggingface_hub.errors.GatedRepoError, "accept its terms"),
        (huggingface_hub.errors.RevisionNotFoundError, "has no revision 'main'"),
        (ConnectionError, r"can't be downloaded \(no route\); check the network"),
    ],
)
def test_what_the_hub_refuses_is_said(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, *, local_files_only: bool, **options: Any) -> str:
        # made without __init__, whose arguments are a response of whatever HTTP library is in use
        raise FileNotFoundError if local_files_only else kind.__new__(kind, "no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(GraniteError, match=message):
        hub.locate("owner/name")
