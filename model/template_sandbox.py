"""A jinja2 sandbox for untrusted chat templates that can neither hang nor exhaust memory.

jinja2's own sandbox stops a template from reaching Python, not from looping: two nested `range(99999)` or a string that
doubles thirty times is within its rules. Here every rendering has a budget of seconds and of characters:

- each pass through a loop body and each call, filter and test spends from it (a call to `tick` is put into the syntax
  tree, because jinja2 has no hook in a loop);
- whatever makes a long text in a single step (`*`, `~`, `%`, `replace`, `join`, `tojson`, ...) is measured before it runs.

The rest is what transformers offers a template: trimmed blocks, `break` and `continue`, `{% generation %}`, `tojson` without
HTML escapes, `raise_exception` and `strftime_now`. `lipsum` (random text) is left out.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from itertools import chain
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 2.0  # the largest real conversations take milliseconds
MAX_TEXT = 1 << 24  # characters in one string; a context of 131072 tokens is about 2**19
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


def _weigh(value: Any) -> int:
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


def _check_small(*numbers: Any) -> None:
    if any(isinstance(number, int) and abs(number) > MAX_NUMBER for number in numbers):
        raise BudgetExceededError(f"asks for a width or a count over {MAX_NUMBER}")


def _percent_weight(text: str, values: Any) -> int:
    if re.search(r"%[^a-zA-Z%]*(\d{6}|\*)", text):
        raise BudgetExceededError("pads a value to an excessive width")
    return len(text) + text.count("%") * _weigh(values)


def _braces_weight(text: str, values: Any, named: Any) -> int:
    if re.search(r"\d{6}|:[^{}]*\{", text):
        raise BudgetExceededError("pads a value to an excessive or a computed width")
    return len(text) + text.count("{") * _weigh([values, named])


def _replace_weight(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + text.count(old) * len(new)


def _indent_weight(value: Any, width: Any = 4, *_: Any, indent: Any = None, **__: Any) -> int:
    step = width if indent is None else indent
    return _weigh(value) * (1 + (len(step) if isinstance(step, str) else int(step or 0)))


def _json_weight(value: Any, *_: Any, indent: Any = None, **__: Any) -> int:
    return _indent_weight(value, indent=indent or 0)


def _join_weight(items: Any, separator: Any = "", *_: Any, d: Any = None, **__: Any) -> int:
    return _weigh(items) + len(items) * len(str(separator if d is None else d))


def _wrap_weight(text: Any, *arguments: Any, wrapstring: Any = None, **__: Any) -> int:
    return len(str(text)) * (1 + _weigh([*arguments, wrapstring]))


_FILTER_WEIGHTS: dict[str, Callable[..., int]] = {
    "format": lambda text, *values, **named: _percent_weight(str(text), named or values),
    "indent": _indent_weight,
    "join": _join_weight,
    "pprint": _weigh,
    "replace": _replace_weight,
    "string": _weigh,
    "tojson": _json_weight,
    "wordwrap": _wrap_weight,
}


_COUNTING_FILTERS = frozenset({"batch", "center", "indent", "round", "slice", "tojson"})  # take a width or a count

_METHOD_WEIGHTS: dict[str, Callable[..., int]] = {
    "join": lambda separator, items: _join_weight(items, separator),
    "replace": _replace_weight,
}


def _guarded(name: str, function: Any) -> Callable[..., Any]:
    """The filter or test `function` with its arguments checked before and its result counted after."""
    weight = _FILTER_WEIGHTS.get(name)
    counting = name in _COUNTING_FILTERS
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        values = list(arguments)
        if weight is not None:
            if isinstance(values[first], Iterator):
                values[first] = list(values[first])
            spend(weight(*values[first:], **named))
        if counting:
            _check_small(*values[first + 1 :], *named.values())
        result = function(*values, **named)
        spend(len(result) if isinstance(result, str | list | tuple) else 0)
        return result

    return guarded


def _add(left: Any, right: Any) -> Any:
    if hasattr(left, "__len__") and hasattr(right, "__len__"):
        spend(len(left) + len(right))
    return left + right


def _multiply(left: Any, right: Any) -> Any:
    for sequence, count in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(count, int):
            spend(len(sequence) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
        raise BudgetExceededError("multiplies very large integers")
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_INTEGER_BITS:
        raise BudgetExceededError("raises an integer to a very large power")
    return left**right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        spend(_percent_weight(left, right))
    return left % right


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, values: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    """jinja2's `sum`, adding under the budget: with lists, the builtin takes quadratic time in one step."""
    for value in values if attribute is None else map(make_attrgetter(environment, attribute), values):
        start = _add(start, value)
    return start


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    _check_small(len(pattern))
    return datetime.now().strftime(pattern)


def _dict(*arguments: Any, **named: Any) -> dict[Any, Any]:
    return dict(*arguments, **named)


def _namespace(*arguments: Any, **named: Any) -> Namespace:
    values = dict(*arguments, **named)
    if any(str(name).startswith("_") for name in values):
        raise SecurityError("a namespace can't have a name that begins with an underscore")
    return Namespace(values)


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, by which training code marks the assistant's text; here it is just text."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Metering(NodeTransformer):
    """Puts `tick` at the head of each loop body, and `concatenate` in the place of the operator `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        text = nodes.Const(sum(len(data.data) for data in node.find_all(nodes.TemplateData)))
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [text], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("concatenate"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno)

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        if node.attr.startswith("_"):
            raise SecurityError("a namespace can't have a name that begins with an underscore")
        return node


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates; compile with `load`, render inside `budget()`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self._count,
            extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        self.filters.update(tojson=_tojson, sum=_sum)
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.tests = {name: _guarded(name, function) for name, function in self.tests.items()}
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_dict, namespace=_namespace
        )
        del self.globals["lipsum"]
        self.binop_table.update({"+": _add, "*": _multiply, "**": _power, "%": _modulo})

    def load(self, text: str) -> jinja2.Template:
        tree = _Metering().visit(self.parse(text))
        tree.set_environment(self)
        return self.from_string(tree)

    def tick(self, characters: int) -> None:
        spend(characters)

    def concatenate(self, *items: Any) -> str:
        spend(_weigh(items))
        return "".join(map(str, items))

    def call(self, context: Context, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """A call written in the template; methods of strings and numbers are measured before they run."""
        if isinstance(getattr(function, "__self__", None), str | bytes | int):
            values = [list(value) if isinstance(value, Iterator) else value for value in arguments]
            if function.__name__ in _METHOD_WEIGHTS:
                spend(_METHOD_WEIGHTS[function.__name__](function.__self__, *values, **named))
            _check_small(*values, *named.values())
            arguments = tuple(values)
        result = super().call(context, function, *arguments, **named)
        spend(len(result) if isinstance(result, str | list | tuple) else 0)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in ("translate", "maketrans") and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def measured(*values: Any, **named: Any) -> str:
            spend(_braces_weight(value.__self__, values, named))
            return formatted(*values, **named)

        return measured

    @staticmethod
    def _count(value: Any) -> Any:
        spend(_weigh(value))
        return value
