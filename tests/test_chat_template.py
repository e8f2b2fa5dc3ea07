"""Chat templates: equal to transformers, bounded whatever the template does, and deaf to control tokens in the data."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from granite_kernels.model.chat_template import MAX_TEMPLATE, ChatTemplate, gguf_templates
from granite_kernels.model.template_budget import MAX_SECONDS
from granite_kernels.model.tokenizer import Tokenizer
from tokenizer_cases import END, check_renderings, make_folder

from granite_kernels.errors import GraniteError

HI = [{"role": "user", "content": "Hi"}]
CONTENT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(make_folder(tmp_path_factory.mktemp("tokenizer")))


def render(template: str, **variables: Any) -> str:
    return ChatTemplate(template, "the template").render({"messages": HI, **variables})


def text_of(tokenizer: Tokenizer, messages: Any, **keywords: Any) -> str:
    text = tokenizer.apply_chat_template(messages, **keywords)
    assert isinstance(text, str)
    return text


# As transformers renders.


def test_renderings_are_transformers(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    check_renderings(tokenizer, transformers.AutoTokenizer.from_pretrained(tokenizer.source))


def test_renderings_are_transformers_with_granites_own(granite_tokenizer_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_folder(granite_tokenizer_folder)
    check_renderings(ours, transformers.AutoTokenizer.from_pretrained(granite_tokenizer_folder))


_SNIPPETS = [
    "  {% if true %}  \n  trimmed\n  {% endif %}\n",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{{ data | tojson }}|{{ data | tojson(indent=2) }}|{{ data | tojson(ensure_ascii=true, sort_keys=true) }}",
    "{{ data | tojson(separators=(',', ':')) }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}\n!",
    "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 2 %}{% endfor %}{{ ns.n }}{{ ns.x }}",
    "{% macro turn(m, end='') %}{{ m.role }}{{ m['content'] }}{{ end }}{% endmacro %}{{ turn(messages[0], end='!') }}",
    "{{ messages | map(attribute='content') | join('+') }}{{ messages[::-1] | length }}{{ 'a' ~ 1 ~ none ~ missing }}",
    "{{ 'x' * 3 }}{{ '%s-%02d' % ('a', 7) }}{{ '{:>5}|{}'.format('a', 1.5) }}",
    "{{ 2 ** 10 }}{{ 7 % 3 }}{{ [1] + [2] }}{{ (1, 2) * 2 }}{{ 3 - 1 }}{{ 7 // 2 }}{{ 7 / 2 }}",
    "{{ 'a-b-c'.split('-')[-1] }}{{ ' x '.strip() }}{{ 'abc'.replace('b', 'BB') }}{{ '-'.join(['a', 'b']) }}",
    "{{ [[1, 2], [3]] | sum(start=[]) }}{{ [1, 2.5] | sum }}{{ [data, data] | sum(attribute='n') }}",
    "{{ dict(a=1) }}{{ data.items() | list }}{{ data.get('none') }}{{ controls is defined }}{{ 'x' in missing }}",
    "{{ 'x' | upper | center(9) | indent(2, true) | replace('X', 'y') }}{{ 3.7 | round | int | string }}",
    "{{ [3, 1, 2] | sort | list }}{{ 'abc' | list | batch(2, '-') | list }}{{ '' | default('z', true) }}",
    "{{ messages | selectattr('role', 'eq', 'user') | list }}{{ messages | rejectattr('role', 'in', 'user') | list }}",
    "{% filter upper %}loud{% endfilter %}{% set block %}b{{ 1 }}{% endset %}{{ block | trim }}{% raw %}{{{% endraw %}",
    "{% for k, v in data | dictsort %}{{ loop.index }}{{ k }}={{ v }};{% else %}none{% endfor %}",
    "{% for x in [[1, [2]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}{{ 'é<&>' | e }}{{ '<&>' }}",
    "{{ messages[0].thinking }}{{ messages[0].reasoning_content }}{{ bos_token }}{{ eos_token }}",
    "{{ add_generation_prompt }}{{ tools }}{{ documents }}{{ messages[0].name is defined }}",
]


@pytest.mark.parametrize("template", _SNIPPETS)
def test_every_construct_is_transformers(tokenizer: Tokenizer, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, bos_token=END, eos_token=END)
    data = {"b": "<é & 'q' \"d\">", "a": [1, None, True, 1.5], "none": None, "n": 2}
    messages = [{"role": "user", "content": "Hi\n", "reasoning": "hm", "name": None}]
    keywords = {"chat_template": template, "data": data, "add_generation_prompt": True}
    expected = theirs.apply_chat_template(messages, tokenize=False, **keywords)
    assert text_of(tokenizer, messages, **keywords) == expected


# Where the template comes from.


def test_jinja_file_goes_before_the_configuration(tmp_path: Path) -> None:
    make_folder(tmp_path, chat_template="from the configuration")
    assert text_of(Tokenizer.from_folder(tmp_path), HI) == "from the configuration"
    (tmp_path / "chat_template.jinja").write_text("from the file: {{ eos_token }}")
    assert text_of(Tokenizer.from_folder(tmp_path), HI) == f"from the file: {END}"


def test_named_templates(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "rag"},
    ]
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path, chat_template=named))
    assert text_of(tokenizer, HI) == "plain"
    assert text_of(tokenizer, HI, tools=[]) == "tools"
    assert text_of(tokenizer, HI, chat_template="rag") == "rag"
    assert text_of(tokenizer, HI, chat_template="{{ messages[0].role }}") == "user"
    without = Tokenizer.from_folder(make_folder(tmp_path, chat_template=named[1:]))
    with pytest.raises(GraniteError, match="named rag, tool_use and no default"):
        without.apply_chat_template(HI)


def test_gguf_templates() -> None:
    metadata = {"tokenizer.chat_template": "a", "tokenizer.chat_template.rag": "b", "tokenizer.chat_templates": ["rag"]}
    assert gguf_templates(metadata, "x.gguf") == {"default": "a", "rag": "b"}
    with pytest.raises(GraniteError, match=r"x\.gguf: tokenizer\.chat_template is 3"):
        gguf_templates({"tokenizer.chat_template": 3}, "x.gguf")


def test_no_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path, chat_template=None))
    assert tokenizer.chat_template is None
    with pytest.raises(GraniteError, match="has no chat template; pass one"):
        tokenizer.apply_chat_template(HI)


@pytest.mark.parametrize("field", [3, {"a": 1}, ["x"], [{"name": "default", "template": 3}]])
def test_a_field_that_is_no_template_is_named(tmp_path: Path, field: Any) -> None:
    make_folder(tmp_path, chat_template=field)
    with pytest.raises(GraniteError, match=r"tokenizer_config\.json: chat_template is"):
        Tokenizer.from_folder(tmp_path)


# What goes in.


@dataclass
class Message:
    role: str
    content: str


class Pydantic:
    def model_dump(self) -> dict[str, str]:
        return {"role": "user", "content": "Hi"}


def test_messages_may_be_dataclasses_and_models(tokenizer: Tokenizer) -> None:
    expected = text_of(tokenizer, HI)
    assert text_of(tokenizer, [Message("user", "Hi")]) == expected
    assert text_of(tokenizer, (Pydantic(),)) == expected


class Dangerous:
    def __str__(self) -> str:
        raise AssertionError("the template called an object's method")


@pytest.mark.parametrize(
    ("messages", "keywords", "message"),
    [
        ([], {}, "messages must be a list of at least one dict"),
        ("Hi", {}, "messages must be a list.*'Hi'"),
        (["Hi"], {}, r"messages\[0\] must be a dict.*'Hi'"),
        ([{"role": "user", "content": Dangerous()}], {}, r"messages\[0\]\.content is a Dangerous.*plain JSON data"),
        (HI, {"tools": [print]}, r"tools\[0\] is a builtin_function_or_method.*its JSON schema"),
        (HI, {"tools": "weather"}, "tools must be a list of dicts, not 'weather'"),
        (HI, {"documents": ["text"]}, r"documents\[0\] must be a dict"),
        (HI, {"controls": {"f": open}}, r"controls\.f is a builtin"),
        (HI, {"return_tensors": "pt"}, "apply_chat_template has no return_tensors"),
        ([{"role": "user"}], {}, "'dict object' has no attribute 'content'"),
    ],
)
def test_bad_arguments_are_named(tokenizer: Tokenizer, messages: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(GraniteError, match=message):
        tokenizer.apply_chat_template(messages, **keywords)


def test_switched_off_keywords_of_transformers_are_taken(tokenizer: Tokenizer) -> None:
    assert text_of(tokenizer, HI, return_dict=False, padding=False) == text_of(tokenizer, HI)


# A template that fails, loops or explodes.


def _nested(body: str) -> str:
    return "{% for a in range(99999) %}{% for b in range(99999) %}" + body + "{% endfor %}{% endfor %}"


_RUNAWAYS = {
    "nested loops": _nested(""),
    "a loop that writes": _nested("x" * 999),
    "a loop that is kept": "{% set x %}" + _nested("x" * 9999) + "{% endset %}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "a quadratic test": "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "a repeated list": "{{ [1] * 10 ** 10 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by adding": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "sharing": "{% set n = namespace() %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "large powers": "{{ 10 ** (10 ** 10) }}",
    "large products": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "padding": "{{ 'a'.ljust(10 ** 9) }}",
    "padding by a filter": "{{ 'a' | center(10 ** 9) }}",
    "padding by %": "{{ '%1000000000d' % 1 }}",
    "padding by a computed width": "{{ '%*d' % (10 ** 9, 1) }}",
    "padding by the filter format": "{{ '%1000000000d' | format(1) }}",
    "padding by format": "{{ '{:>1000000000}'.format(1) }}",
    "padding by a nested format": "{{ '{:>{}}'.format(1, 10 ** 9) }}",
    "replacing": "{% set x = 'a' * 1000000 %}{{ x.replace('', x) }}",
    "replacing by a filter": "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
    "joining": "{% set x = 'a' * 1000000 %}{{ x.join(range(99999) | map('string')) }}",
    "joining by a filter": "{{ range(99999) | join('a' * 1000000) }}",
    "filling": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "indenting": "{{ ('\n' * 1000000) | indent(90000) }}",
    "indenting JSON": "{{ range(99999) | list | tojson(indent=99999) }}",
    "many parts": "{% set x = 'a' * 16000000 %}{% set y %}" + "{{ x }}" * 500 + "{% endset %}",
    "indenting JSON by position": "{{ range(99999) | list | tojson(false, 99999) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(90000) }}",
    "summing lists": "{% set x = range(99999) | list %}{{ ([x] * 99999) | sum(start=[]) | length }}",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(_RUNAWAYS))
def test_a_runaway_template_is_stopped(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(GraniteError, match="the template: stopped, because it"):
        ChatTemplate(_RUNAWAYS[name], "the template", seconds=0.3).render({})
    assert time.monotonic() - start < 3


def test_the_usual_time_is_within_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(GraniteError, match=f"runs for more than {MAX_SECONDS:g} s"):
        render(_RUNAWAYS["nested loops"])
    assert time.monotonic() - start < 4


_FAILURES = {
    "syntax": ("a\n{% if %}", r"line 2: not a valid jinja2 template"),
    "an unknown filter": ("{{ x | nope }}", "No filter named 'nope'"),
    "deep brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "can't be compiled"),
    "deep blocks": ("{% if x %}" * 3000 + "{% endif %}" * 3000, "can't be compiled"),
    "many filters": ("{{ x" + "| upper" * 5000 + "}}", "can't be compiled"),
    "too long": ("x" * (MAX_TEMPLATE + 1), f"has {MAX_TEMPLATE + 1} characters"),
    "its own words": ("{{ raise_exception('Roles must alternate') }}", "the template: Roles must alternate$"),
    "an undefined value": ("{{ a.b }}", "'a' is undefined"),
    "a wrong type": ("{{ 1 + 'a' }}", "failed with TypeError"),
    "division": ("{{ 1 / 0 }}", "failed with ZeroDivisionError"),
    "escaping": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "escaping by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
    "escaping by a namespace": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "underscore"),
    "a namespace made so": ("{{ namespace(**{'__class__': 1}) }}", "underscore"),
    "integer bytes": ("{{ (1).to_bytes(10 ** 10, 'big') }}", "unsafe"),
    "encoding": ("{{ 'a'.encode() }}", "unsafe"),
    "translating": ("{{ 'a'.translate({97: 'b'}) }}", "unsafe"),
    "changing the messages": ("{{ messages.append(1) }}", "unsafe"),
    "including": ("{% include 'x' %}", "failed with"),
    "random text": ("{{ lipsum(3) }}", "'lipsum' is undefined"),
}


@pytest.mark.parametrize("name", sorted(_FAILURES))
def test_a_failing_template_is_a_clear_error(name: str) -> None:
    template, message = _FAILURES[name]
    with pytest.raises(GraniteError, match=message) as caught:
        render(template)
    assert "the template" in str(caught.value)


def test_a_long_conversation_is_within_the_bounds(tokenizer: Tokenizer) -> None:
    turn = [{"role": "user", "content": "word " * 1000}, {"role": "assistant", "content": "word " * 1000}]
    assert len(text_of(tokenizer, turn * 100)) > 1_000_000
