"""Token ids to text one at a time, without half a character and without decoding anything twice."""

import codecs
from typing import Protocol

from tokenizers import Tokenizer, decoders


class StreamDecoder(Protocol):
    """The pieces from `push`, followed by the one from `finish`, joined are what `decode` makes of all the ids."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; empty while a character is incomplete."""

    def finish(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD, as in `decode`."""


def stream_decoder(backend: Tokenizer, skipped: frozenset[int]) -> StreamDecoder:
    """The decoder that fits the tokenizer; the ids in `skipped` make no text."""
    if isinstance(backend.decoder, decoders.ByteLevel):
        return _ByteLevelStream(backend, skipped)
    return _WindowStream(backend, skipped)


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary: printable Latin-1 is itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class _ByteLevelStream:
    def __init__(self, backend: Tokenizer, skipped: frozenset[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        return "" if token is None else self._utf8.decode(_token_bytes(token))

    def finish(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:  # an added token, which stands for itself
        return token.encode("utf-8", errors="replace")


class _WindowStream:
    """For other decoders, whose text for a token depends on its neighbours: decodes again from the last sure place."""

    _LIMIT = 16  # ids held back at most; no character takes more byte tokens

    def __init__(self, backend: Tokenizer, skipped: frozenset[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._ids: list[int] = []
        self._start = self._sure = 0
        self._emitted = 0

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        before = self._decode(self._start, self._sure)
        after = self._decode(self._start, len(self._ids))
        held = len(self._ids) - self._sure
        if not after.startswith(before) or (after.endswith("\ufffd") and held < self._LIMIT):
            return ""
        self._start, self._sure = self._sure, len(self._ids)
        self._emitted += len(after) - len(before)
        return after[len(before) :]

    def finish(self) -> str:
        return self._decode(0, len(self._ids))[self._emitted :]

    def _decode(self, start: int, end: int) -> str:
        return self._backend.decode(self._ids[start:end], skip_special_tokens=False)
