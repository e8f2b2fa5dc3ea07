"""What one rendering of a chat template may use: seconds, and characters made, each step measured before it runs.

The `*_weight` functions bound the length of what one step of a template makes, from its arguments alone.
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

MAX_SECONDS = 2.0  # the largest real conversations take milliseconds
MAX_TEXT = 1 << 23  # characters in one string; a context of 131072 tokens is about 2**19 of them
MAX_WORK = 1 << 29  # characters made by one rendering, intermediate strings included
MAX_NUMBER = 100_000  # widths, counts and paddings; jinja2's own limit for range()
MAX_INTEGER_BITS = 1 << 14


class BudgetExceededError(Exception):
    """A rendering used up its time or its characters; not a ValueError, which some filters swallow."""


class _Budget:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self.work = MAX_WORK

    def spend(self, characters: int = 0) -> None:
        if characters > MAX_TEXT:
            raise BudgetExceededError(f"makes a text of more than {MAX_TEXT} characters")
        self.work -= characters
        if self.work < 0:
            raise BudgetExceededError(f"makes more than {MAX_WORK} characters in all")
        if time.monotonic() > self.deadline:
            raise BudgetExceededError(f"runs for more than {self.seconds:g} s")


_current: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def budget(seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Bound everything that the templates of this thread do inside the block."""
    token = _current.set(_Budget(seconds))
    try:
        yield
    finally:
        _current.reset(token)


def spend(characters: int = 0) -> None:
    """Take `characters` and the time passed so far from the budget; raises BudgetExceededError when it is used up."""
    current = _current.get()
    if current is not None:
        current.spend(characters)


def weigh(value: Any) -> int:
    """A lower bound on the characters of `value` as text; stops early, so that shared references can't make it long."""
    total, steps, stack = 0, 0, [value]
    while stack and total <= MAX_TEXT:
        item = stack.pop()
        steps += 1
        if steps % 65536 == 0:
            spend()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 4 * len(item)
            stack.extend(chain.from_iterable(item.items()))
        elif isinstance(item, list | tuple | set):
            total += 2 * len(item)
            stack.extend(item)
        else:
            total += 1
    return total


def check_small(*numbers: Any) -> None:
    """Refuse a width or count that no prompt needs."""
    if any(isinstance(number, int) and abs(number) > MAX_NUMBER for number in numbers):
        raise BudgetExceededError(f"asks for a width or a count over {MAX_NUMBER}")


def percent_weight(text: str, values: Any) -> int:
    if re.search(r"%[^a-zA-Z%]*(\d{6}|\*)", text):
        raise BudgetExceededError("pads a value to an excessive width")
    return len(text) + text.count("%") * weigh(values)


def braces_weight(text: str, values: Any, named: Any) -> int:
    if re.search(r"\{[^{}]*(\d{6}|:[^{}]*\{)", text):
        raise BudgetExceededError("pads a value to an excessive or a computed width")
    return len(text) + text.count("{") * weigh([values, named])


def replace_weight(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + text.count(old) * len(new)


def indent_weight(value: Any, width: Any = 4, *_: Any, indent: Any = None, **__: Any) -> int:
    step = width if indent is None else indent
    return weigh(value) * (1 + (len(step) if isinstance(step, str) else int(step or 0)))


def json_weight(value: Any, ensure_ascii: Any = False, indent: Any = None, *_: Any, **__: Any) -> int:
    return indent_weight(value, indent=indent or 0)


def tabs_weight(text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * tabsize


def join_weight(items: Any, separator: Any = "", *_: Any, d: Any = None, **__: Any) -> int:
    return weigh(items) + len(items) * len(str(separator if d is None else d))


def wrap_weight(text: Any, *arguments: Any, wrapstring: Any = None, **__: Any) -> int:
    return len(str(text)) * (1 + weigh([*arguments, wrapstring]))
