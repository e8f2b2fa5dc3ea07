"""From tokens to text as they come: whole characters only, and never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .tokenizer import Tokenizer


class StopText:
    """Text that ends before the first stop string; holds back an ending that could become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain once `piece` has come."""
        if self.stopped or not self.stop:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self.stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def pieces(tokens: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str], eos: frozenset[int]) -> Iterator[str]:
    """Decode a stream of tokens; ends with the stream, or where a stop string begins. An end token is not text."""
    decoder, guard = tokenizer.stream_decoder(skip_special_tokens=True), StopText(stop)
    for token in tokens:
        piece = guard.push(decoder.push(token)) if token not in eos else ""
        if piece:
            yield piece
        if guard.stopped:
            return
    tail = guard.push(decoder.finish())
    rest = tail + guard.finish()
    if rest:
        yield rest
