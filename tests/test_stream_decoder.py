"""Decoding one id at a time: whole characters only, in linear time, and in sum what `decode` makes."""

import time

import pytest
from granite_kernels.model.stream_decoder import stream_decoder
from granite_kernels.model.tokenizer import Tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_cases import END, LAST_SPECIAL, make_folder
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(make_folder(tmp_path_factory.mktemp("tokenizer")))


@given(data=st.data())
def test_streamed_pieces_are_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    skip = data.draw(st.booleans())
    stream = tokenizer.stream_decoder(skip_special_tokens=skip)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_no_half_character_is_streamed(tokenizer: Tokenizer) -> None:
    text = "naïve 🙂 日本 👩‍👩‍👧‍👦 ok"
    for skip in (False, True):
        stream = tokenizer.stream_decoder(skip_special_tokens=skip)
        ids = tokenizer.encode(text)
        pieces = [stream.push(token_id) for token_id in ids]
        assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
        assert stream.finish() == ""
    bird = tokenizer.encode("🙃")
    assert len(bird) > 1
    stream = tokenizer.stream_decoder()
    assert [stream.push(token_id) for token_id in bird[:-1]] == [""] * (len(bird) - 1)
    assert stream.finish() == "\ufffd"


def test_streaming_takes_linear_time(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🙃")[0]
    stream = tokenizer.stream_decoder()
    start = time.process_time()
    assert sum(len(stream.push(half)) for _ in range(100_000)) == 99_999  # each one ends the one before
    assert time.process_time() - start < 2.0


def test_streaming_with_a_sentencepiece_decoder() -> None:
    vocabulary = ["<unk>", "▁a", "▁b", "c", *(f"<0x{byte:02X}>" for byte in "é🙂".encode())]
    backend = Backend(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    for ids in ([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 1], [4, 5], [6, 7, 8], [], [3, 6, 1, 7]):
        stream = stream_decoder(backend, frozenset({0}))
        pieces = [stream.push(token_id) for token_id in [0, *ids]]
        assert "".join([*pieces, stream.finish()]) == backend.decode(ids)
    stream = stream_decoder(backend, frozenset())
    assert [stream.push(token_id) for token_id in (1, 2, 4, 5, 2)] == ["a", " b", "", "é", " b"]


def test_special_tokens_are_kept_or_skipped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{LAST_SPECIAL[2]}b{END}")
    assert tokenizer.decode(ids) == f"a{LAST_SPECIAL[2]}b{END}"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
