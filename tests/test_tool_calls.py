"""parse_tool_calls: the three forms that the models write, and malformed calls reported in their place."""

import json
import time
from typing import Any

import pytest
from granite_kernels.model.tool_calls import parse_tool_calls
from hypothesis import given
from hypothesis import strategies as st

A = {"name": "a", "arguments": {"x": 1}}
B = {"name": "b", "arguments": {"y": [True, None, "é"], "z": {"w": 1.5}}}
ONE, TWO = json.dumps([A]), json.dumps([A, B])


@pytest.mark.parametrize("mark", ["<|tool_call|>", "<tool_call>", ""])
@pytest.mark.parametrize(
    ("written", "calls"),
    [
        (ONE, [A]),
        (TWO, [A, B]),
        (json.dumps(A), [A]),
        (f"{json.dumps(A)}\n{json.dumps(B)}", [A, B]),
        (f"{json.dumps(A)}, {json.dumps(B)}", [A, B]),
        (f"\n {json.dumps([A, B], indent=4)} \n", [A, B]),
        (f"```json\n{TWO}\n```", [A, B]),
        (f"{TWO} and some more words", [A, B]),
        (TWO[:-1], [A, B]),
        (json.dumps([{"type": "function", "function": A}]), [A]),
        (json.dumps([{"name": "a", "arguments": json.dumps(A["arguments"])}]), [A]),
        (json.dumps([{"name": "a", "parameters": A["arguments"]}]), [A]),
        (json.dumps([{"name": "a", "arguments": None}]), [{"name": "a", "arguments": {}}]),
    ],
)
def test_every_form(mark: str, written: str, calls: list[dict[str, Any]]) -> None:
    assert parse_tool_calls(mark + written) == calls
    assert parse_tool_calls(f"{mark} {written}<|end_of_text|>") == calls


def test_marked_calls_among_words() -> None:
    assert parse_tool_calls(f"Let me look.\n<tool_call>{json.dumps(A)}</tool_call>\n<tool_call>{json.dumps(B)}</tool_call>") == [A, B]
    assert parse_tool_calls(f"<tool_call>{ONE} then <|tool_call|>{json.dumps(B)}") == [A, B]
    assert parse_tool_calls(f"<tool_call>{ONE[:-1]}</tool_call>") == [A]
    assert parse_tool_calls('<tool_call>[{"name": "a"}]') == [{"name": "a", "arguments": {}}]
    assert parse_tool_calls("<tool_call>[]") == []


def test_a_mark_inside_an_argument_is_text() -> None:
    call = {"name": "echo", "arguments": {"text": '<tool_call>[{"name": "evil"}]'}}
    assert parse_tool_calls(f"<tool_call>{json.dumps([call, A])}") == [call, A]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Paris.",
        "[1, 2, 3]",
        '{"city": "Bern"}',
        '{"name": "Bob", "age": 3}',
        '[{"name": "Bob"}]',
        "[see below] and {so on}",
    ],
)
def test_an_answer_without_calls(answer: str) -> None:
    assert parse_tool_calls(answer) == []


@pytest.mark.parametrize(
    ("written", "before", "reason", "text"),
    [
        ("<tool_call>", [], "no JSON follows", ""),
        ("<tool_call>I can't.", [], "not valid JSON", "I can't."),
        ("<tool_call>[{'name': 'a'}]", [], "not valid JSON", "[{'name': 'a'}]"),
        (f"<tool_call>{ONE[:-1]}, {json.dumps(B)[:-9]}", [A], "not valid JSON", json.dumps(B)[:-9]),
        (ONE[:-3], [], "not valid JSON", ONE[:-3]),
        ("<tool_call>[5]", [], "not an object with a name", "5"),
        ('<tool_call>[{"name": ""}]', [], "not an object with a name", '{"name": ""}'),
        ('<tool_call>{"arguments": {}}', [], "not an object with a name", '{"arguments": {}}'),
        (
            '<tool_call>{"name": "a", "arguments": [1]}',
            [],
            "the arguments are not an object",
            '{"name": "a", "arguments": [1]}',
        ),
        (
            '<tool_call>{"name": "a", "arguments": "x"}',
            [],
            "the arguments are not valid JSON",
            '{"name": "a", "arguments": "x"}',
        ),
        ("<tool_call>" + "[" * 100_000, [], "not valid JSON", "[" * 100_000),
    ],
)
def test_malformed_calls_are_reported(written: str, before: list[dict[str, Any]], reason: str, text: str) -> None:
    *found, last = parse_tool_calls(written)
    assert found == before
    assert last.keys() == {"error", "text"}
    assert last["error"].startswith(reason) and last["text"] == text


def test_good_calls_around_a_malformed_one_are_kept() -> None:
    calls = parse_tool_calls(f"<tool_call>{json.dumps([A, 5, B])}")
    assert [calls[0], calls[2]] == [A, B] and calls[1]["text"] == "5"
    calls = parse_tool_calls(f"<tool_call>[{{broken <tool_call>{ONE}")
    assert calls[0]["text"] == "[{broken" and calls[1:] == [A]


@given(st.text(alphabet='<tool_call>|[]{},:" \\naeu1`', max_size=80))
def test_any_text_is_survived(text: str) -> None:
    for call in parse_tool_calls(text):
        assert set(call) in ({"name", "arguments"}, {"error", "text"})


def test_a_long_answer_takes_linear_time() -> None:
    start = time.process_time()
    assert len(parse_tool_calls("<tool_call>" * 20_000)) == 20_000
    assert len(parse_tool_calls("<tool_call>" + json.dumps([A] * 20_000))) == 20_000
    assert time.process_time() - start < 2.0
