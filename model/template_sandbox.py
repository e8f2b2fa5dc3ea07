"""A jinja2 sandbox for untrusted chat templates that can neither hang nor exhaust memory.

jinja2's own sandbox stops a template from reaching Python, not from looping: two nested `range(99999)` or a string that
doubles thirty times is within its rules. Here every rendering has a budget of seconds and of characters:

- each pass through a loop body and each call, filter and test spends from it (a call to `tick` is put into the syntax
  tree, because jinja2 has no hook in a loop);
- whatever makes a long text in a single step (`*`, `~`, `%`, `replace`, `join`, `tojson`, ...) is measured beforehand.

The rest is what transformers offers a template: trimmed blocks, `break` and `continue`, `{% generation %}`, `tojson`
without HTML escapes, `raise_exception` and `strftime_now`. `lipsum` (random text) is left out.
"""

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .template_budget import (
    MAX_INTEGER_BITS,
    BudgetExceededError,
    braces_weight,
    check_small,
    indent_weight,
    join_weight,
    json_weight,
    percent_weight,
    replace_weight,
    spend,
    tabs_weight,
    weigh,
    wrap_weight,
)

_FILTER_WEIGHTS: dict[str, Callable[..., int]] = {
    "format": lambda text, *values, **named: percent_weight(str(text), named or values),
    "indent": indent_weight,
    "join": join_weight,
    "pprint": weigh,
    "replace": replace_weight,
    "string": weigh,
    "tojson": json_weight,
    "wordwrap": wrap_weight,
}

_COUNTING_FILTERS = frozenset({"batch", "center", "indent", "round", "slice", "tojson"})  # take a width or a count

_METHOD_WEIGHTS: dict[str, Callable[..., int]] = {
    "expandtabs": tabs_weight,
    "join": lambda separator, items: join_weight(items, separator),
    "replace": replace_weight,
}

# Methods of strings and integers that no template needs, left out rather than measured.
_UNBOUNDED = frozenset({"encode", "maketrans", "to_bytes", "translate"})


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
            check_small(*values[first + 1 :], *named.values())
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
        spend(percent_weight(left, right))
    return left % right


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, values: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    """jinja2's `sum`, adding under the budget: with lists, the builtin takes quadratic time in one step."""
    for value in values if attribute is None else map(make_attrgetter(environment, attribute), values):
        start = _add(start, value)
    return start


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    check_small(len(pattern))
    return datetime.now().strftime(pattern)


def _dict(*arguments: Any, **named: Any) -> dict[Any, Any]:
    return dict(*arguments, **named)


def _namespace(*arguments: Any, **named: Any) -> Namespace:
    values = dict(*arguments, **named)
    if any(str(name).startswith("_") for name in values):
        raise SecurityError("a namespace can't have a name that begins with an underscore")
    return Namespace(values)


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, by which training code marks the assistant's text; here just text."""

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
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_dict, namespace=_namespace)
        del self.globals["lipsum"]
        self.binop_table.update({"+": _add, "*": _multiply, "**": _power, "%": _modulo})

    def load(self, text: str) -> jinja2.Template:
        tree = _Metering().visit(self.parse(text))
        tree.set_environment(self)
        return self.from_string(tree)

    def tick(self, characters: int) -> None:
        spend(characters)

    def concatenate(self, *items: Any) -> str:
        spend(weigh(items))
        return "".join(map(str, items))

    def call(self, context: Context, function: Any, /, *arguments: Any, **named: Any) -> Any:
        """A call written in the template; methods of strings and numbers are measured before they run."""
        if isinstance(getattr(function, "__self__", None), str | bytes | int):
            values = [list(value) if isinstance(value, Iterator) else value for value in arguments]
            if function.__name__ in _METHOD_WEIGHTS:
                spend(_METHOD_WEIGHTS[function.__name__](function.__self__, *values, **named))
            check_small(*values, *named.values())
            arguments = tuple(values)
        result = super().call(context, function, *arguments, **named)
        spend(len(result) if isinstance(result, str | list | tuple) else 0)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _UNBOUNDED and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def measured(*values: Any, **named: Any) -> str:
            spend(braces_weight(value.__self__, values, named))
            return formatted(*values, **named)

        return measured

    @staticmethod
    def _count(value: Any) -> Any:
        spend(weigh(value))
        return value
