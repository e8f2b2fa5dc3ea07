"""The tool calls in an answer, in each of the forms that Granite models write them.

Granite 3.0 begins with the token `<|tool_call|>`, 3.1 mostly with the plain characters `<tool_call>`, and either may
leave the mark out and write bare JSON. What follows is a list of objects, one object, or several in a row.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

_MARK = re.compile(r"<\|tool_call\|>|<tool_call>")
_FENCE = re.compile(r"\s*(?:```(?:json)?\s*)?")
_BETWEEN = re.compile(r"[\s,]*")
# What an unmarked answer must look like to be taken for a call, and not for JSON that the user asked for.
_BARE_CALL = re.compile(r'[\[{\s]*"(?:name|function|type)"\s*:[\s\S]*"(?:arguments|parameters)"')
_decoder = json.JSONDecoder()


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls in `text`, in order, each {"name": str, "arguments": dict}; an answer without calls gives [].

    A call that can't be read is reported in its place as {"error": what is wrong, "text": what was written}, so that a
    caller can hand it back to the model. Arguments given as a string of JSON are decoded; absent ones are {}.
    """
    mark = _MARK.search(text)
    if mark is None:
        start = _skip(_FENCE, text, 0)
        return _calls(text, start)[0] if _BARE_CALL.match(text, start) else []
    calls: list[dict[str, Any]] = []
    while mark is not None:
        found, end = _calls(text, _skip(_FENCE, text, mark.end()))
        calls += found
        mark = _MARK.search(text, max(end, mark.end()))
    return calls


def _skip(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    return match.end() if match else start


def _next_mark(text: str, start: int) -> int:
    mark = _MARK.search(text, start)
    return mark.start() if mark else len(text)


def _calls(text: str, start: int) -> tuple[list[dict[str, Any]], int]:
    """(the calls written from `start` on, where they end); what can't be read is taken to end at the next mark."""
    limit = _next_mark(text, start)
    listed = text.startswith("[", start)
    position = start + listed
    calls: list[dict[str, Any]] = []
    while True:
        position = _skip(_BETWEEN, text, position)
        if position > limit:  # the mark was a word in an argument
            limit = _next_mark(text, position)
        if listed and text.startswith("]", position):
            return calls, position + 1
        if calls and (position == len(text) or text.startswith("<", position)):  # the list wasn't closed
            return calls, position
        if calls and not listed and not text.startswith("{", position):
            return calls, position
        if position == limit:
            return [*calls, _malformed("no JSON follows", "")], limit
        try:
            value, end = _decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            written = text[position if calls else start : limit]
            return [*calls, _malformed(f"not valid JSON: {error}", written)], limit
        calls += (_call(item, text[position:end]) for item in _unlisted(value))
        position = end


def _unlisted(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        yield from value
    else:
        yield value


def _call(value: Any, written: str) -> dict[str, Any]:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]  # as in the OpenAI interface
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return _malformed("not an object with a name", written)
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return _malformed(f"the arguments are not valid JSON: {error}", written)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return _malformed("the arguments are not an object", written)
    return {"name": value["name"], "arguments": arguments}


def _malformed(reason: str, written: str) -> dict[str, Any]:
    return {"error": reason, "text": written.strip()}
