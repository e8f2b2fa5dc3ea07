"""Telling a template's control tokens from the same words in somebody's text.

A rendered chat is one string, in which `<|end_of_text|>` written by the template and `<|end_of_text|>` typed by a user
look alike. So a chat whose data could hold such a word is rendered with one character of the word replaced by a
private-use one. That rendering has the same length and the same shape, and each control token still whole in it is the
template's own.

Two pieces of data that only together spell a control token, or a piece that a template's own characters complete, are
caught the same way: a piece that begins like the end of a control token, or ends like its beginning, is marked too.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

TOOL_CALL = "<|tool_call|>"
_PRIVATE_USE = range(0xF0000, 0x10FFFE)


class ControlTokens:
    """The special tokens of one vocabulary, and which characters of a text could be taken for them."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = frozenset(word for word in words if word)
        longest_first = sorted(self.words, key=len, reverse=True)  # as the tokenizer prefers
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._word = re.compile(alternatives)
        self._heads = tuple({word[:end] for word in self.words for end in range(2, len(word))})
        self._tails = tuple({word[start:] for word in self.words for start in range(1, len(word) - 1)})
        self.alphabet = sorted({character for word in self.words for character in word})

    def split(self, text: str) -> Iterator[tuple[bool, str]]:
        """(is a control token, piece) from left to right; the pieces joined are `text`."""
        end = 0
        for match in self._word.finditer(text):
            yield False, text[end : match.start()]
            yield True, match[0]
            end = match.end()
        yield False, text[end:]

    def doubtful(self, text: str) -> set[int]:
        """The characters to mark in one piece of data; none in a harmless one. Each is one of `alphabet`."""
        positions: set[int] = set()
        match = self._word.search(text)
        while match is not None:  # overlapping ones, too
            positions.add(match.start())
            match = self._word.search(text, match.start() + 1)
        if text.endswith(self._heads):
            positions.add(len(text) - max(len(head) for head in self._heads if text.endswith(head)))
        inside = len(text) > 1 and not text.isidentifier() and any(text in word for word in self.words)
        if inside or text.startswith(self._tails):
            positions.add(0)
        return positions

    def marks(self, data: Any, template: str) -> "Marks | None":
        """The marks for `data` (plain JSON data) in `template`; None if nothing in it could be taken for control."""
        texts = list(_strings(data))
        if not any(self.doubtful(text) for text in texts):
            return None
        used = set(template).union(*texts)
        unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        return Marks(self, dict(zip(self.alphabet, unused, strict=False)))


class Marks:
    """Private-use characters, absent from data and template, that stand for the characters of control tokens."""

    def __init__(self, control: ControlTokens, marks: Mapping[str, str]) -> None:
        self._control = control
        self._marks = marks
        # `tojson(ensure_ascii=true)` writes a mark as an escape, and the character that it stands for as itself.
        spellings = {mark: character for character, mark in marks.items()}
        self._characters = spellings | {json.dumps(mark)[1:-1]: character for mark, character in spellings.items()}
        self._mark = re.compile("|".join(map(re.escape, self._characters)))

    def mark(self, data: Any) -> Any:
        """`data` with its doubtful characters marked, in values and keys alike."""
        if isinstance(data, str):
            positions = self._control.doubtful(data)
            return "".join(self._marks[c] if i in positions else c for i, c in enumerate(data)) if positions else data
        if isinstance(data, Mapping):
            return {self.mark(key): self.mark(value) for key, value in data.items()}
        if isinstance(data, list | tuple):
            return type(data)(self.mark(item) for item in data)
        return data

    def unmark(self, text: str) -> str:
        return self._mark.sub(lambda match: self._characters[match[0]], text)


def without_tool_call(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(the messages with the tool-call token at the head of each assistant turn taken off, those heads).

    A call that the model made is replayed as `<|tool_call|>[...]`: at this one place the token is the model's own.
    """
    bare, heads = [], []
    for message in messages:
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str) and content.startswith(TOOL_CALL):
            heads.append(TOOL_CALL)
            bare.append({**message, "content": content.removeprefix(TOOL_CALL)})
        else:
            heads.append("")
            bare.append(message)
    return bare, heads


def _strings(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(data, list | tuple):
        for item in data:
            yield from _strings(item)
