"""Chat templates: finding a checkpoint's own, and rendering messages with it exactly as transformers does.

A template is untrusted code and a message untrusted data: the template runs in the bounded sandbox of
`template_sandbox`, and only plain JSON data goes in.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from granite_kernels.errors import GraniteError

from .template_budget import MAX_SECONDS, MAX_TEXT, BudgetExceededError, budget
from .template_sandbox import BoundedEnvironment

MAX_TEMPLATE = 1 << 17  # characters; published templates have 1,000 to 30,000
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # the names under which callers hand in a message's reasoning


def plain_data(value: Any, where: str) -> Any:
    """A copy of `value` made of None, bool, int, float, str, list, tuple and dict alone; `where` names it in an error.

    Mappings, dataclasses and pydantic models become dicts. Anything else raises GraniteError: an object with methods
    must not reach the template.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for scalar in (str, int, float):
        if isinstance(value, scalar):
            return scalar.__str__(value) if scalar is str else scalar(value)
    if isinstance(value, Mapping):
        return {plain_data(key, where): plain_data(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain_data(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_data(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain_data(value.model_dump(), where)
    hint = "pass its JSON schema as a dict" if callable(value) else "convert it to strings, numbers, lists and dicts"
    raise GraniteError(f"{where} is a {type(value).__name__}, and a chat template takes plain JSON data only: {hint}")


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as transformers hands them to a template: no keys with None, reasoning under its usual names."""
    if not isinstance(messages, list | tuple) or not messages:
        raise GraniteError(f"messages must be a list of at least one dict with role and content, not {_shown(messages)}")
    plain = []
    for index, message in enumerate(plain_data(messages, "messages")):
        if not isinstance(message, dict):
            raise GraniteError(f"messages[{index}] must be a dict with role and content, not {_shown(message)}")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        plain.append(message)
    return plain


def plain_dicts(values: Any, name: str) -> list[dict[str, Any]] | None:
    """The tools or documents as a list of plain dicts, or None."""
    if values is None:
        return None
    if not isinstance(values, list | tuple):
        raise GraniteError(f"{name} must be a list of dicts, not {_shown(values)}")
    plain = list(plain_data(values, name))
    for index, item in enumerate(plain):
        if not isinstance(item, dict):
            raise GraniteError(f"{name}[{index}] must be a dict, not {_shown(item)}")
    return plain


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class ChatTemplate:
    """One compiled template, whose renderings may take `seconds` each.

    `text` is its source and `where` names it in errors; one that can't be compiled raises GraniteError here.
    """

    def __init__(self, text: str, where: str, *, seconds: float = MAX_SECONDS) -> None:
        self._seconds = seconds
        self.text = text
        self.where = where
        if len(text) > MAX_TEMPLATE:
            raise GraniteError(f"{where}: has {len(text)} characters, more than the {MAX_TEMPLATE} a template may have")
        environment = BoundedEnvironment()
        try:
            with budget(self._seconds):
                self._template = environment.load(text)
        except jinja2.TemplateSyntaxError as error:
            raise GraniteError(f"{where}, line {error.lineno}: not a valid jinja2 template: {error.message}") from error
        except (
            jinja2.TemplateError,
            BudgetExceededError,
            RecursionError,
            MemoryError,
            SyntaxError,
            ValueError,
        ) as error:
            raise GraniteError(f"{where}: can't be compiled: {str(error) or type(error).__name__}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for `variables` (plain JSON data).

        Raises GraniteError when the template refuses the messages, fails, or exceeds its time or size.
        """
        pieces: list[str] = []
        size = 0
        try:
            with budget(self._seconds):
                for piece in self._template.generate(variables):
                    size += len(piece)
                    if size > MAX_TEXT:
                        raise BudgetExceededError(f"makes a text of more than {MAX_TEXT} characters")
                    pieces.append(piece)
        except BudgetExceededError as error:
            raise GraniteError(f"{self.where}: stopped, because it {error}; use another template") from error
        except RecursionError as error:
            raise GraniteError(f"{self.where}: stopped, because it recurses without end; use another template") from error
        except jinja2.UndefinedError as error:
            raise GraniteError(f"{self.where}: {error.message}; it needs a field that the messages don't have") from error
        except jinja2.TemplateError as error:
            raise GraniteError(f"{self.where}: {error.message}") from error
        except Exception as error:  # an untrusted program can raise anything
            raise GraniteError(f"{self.where}: failed with {type(error).__name__}: {error}") from error
        return "".join(pieces)


def folder_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a checkpoint folder by name, the usual one as "default".

    `chat_template.jinja` (with `additional_chat_templates/NAME.jinja`) goes before the field of tokenizer_config.json,
    which is a string or a list of {"name", "template"}.
    """
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read(path) for name, path in files.items()}
    field = tokenizer_config.get("chat_template")
    if field is None:
        return {}
    if isinstance(field, str):
        return {"default": field}
    try:
        named = {str(entry["name"]): entry["template"] for entry in field}
    except (TypeError, KeyError):
        named = {"default": field}
    if not all(isinstance(text, str) for text in named.values()):
        raise GraniteError(f"{folder / 'tokenizer_config.json'}: chat_template is {_shown(field)}, not a string or named strings")
    return named


def _read(path: Path) -> str:
    if path.stat().st_size > 4 * MAX_TEMPLATE:
        raise GraniteError(f"{path}: has {path.stat().st_size} bytes, more than the {4 * MAX_TEMPLATE} a template may have")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GraniteError(f"{path}: is not UTF-8 text: {error}") from error


def gguf_templates(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    """The templates in a GGUF by name: `tokenizer.chat_template` as "default", and `tokenizer.chat_template.NAME`."""
    prefix = "tokenizer.chat_template"
    templates = {}
    for key, value in metadata.items():
        match = re.fullmatch(re.escape(prefix) + r"(?:\.(.+))?", key)
        if match is None:
            continue
        if not isinstance(value, str):
            raise GraniteError(f"{source}: {key} is {_shown(value)}, not a string")
        templates[match[1] or "default"] = value
    return templates


def choose_template(templates: Mapping[str, str], tools: Any, asked: str | None, source: str) -> tuple[str, str]:
    """(text, where) of the template to use.

    `asked` is the name of one of `templates` or a template's text; without it "tool_use" serves a request with tools,
    where there is one, and "default" any other. Raises GraniteError when there is none.
    """
    if asked is not None:
        return (templates[asked], f"{source}: chat template {asked}") if asked in templates else (asked, "chat_template")
    name = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if name in templates:
        return templates[name], f"{source}: chat template"
    if templates:
        names = ", ".join(sorted(templates))
        raise GraniteError(f"{source}: has chat templates named {names} and no default; pass one as chat_template=NAME")
    raise GraniteError(f"{source}: has no chat template; pass one as chat_template=, or a plain prompt instead of messages")
