"""The tokenizer of a checkpoint: text to ids and back, and messages to a prompt.

A folder tokenizes as its tokenizer.json says, as transformers does; a GGUF as llama.cpp does. The two disagree on a few
texts (several spaces before a digit, some numerals), because the files do.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import tokenizers
from tokenizers import AddedToken, processors

from granite_kernels.errors import GraniteError

from .chat_template import (
    ChatTemplate,
    choose_template,
    folder_templates,
    gguf_templates,
    plain_data,
    plain_dicts,
    plain_messages,
)
from .control_tokens import ControlTokens, without_tool_call
from .gguf_tokenizer import build_backend, framing, special_token_ids
from .stream_decoder import StreamDecoder, stream_decoder

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_NOT_OURS = frozenset(
    {
        "continue_final_message",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenizer_kwargs",
        "truncation",
    }
)  # what transformers' apply_chat_template takes beside template variables


class TokenizerSource(Protocol):
    """What `load_tokenizer` needs of an open checkpoint."""

    kind: str
    path: Any
    gguf_metadata: dict[str, Any]
    config: Any


class Tokenizer:
    """`encode`, `decode`, `apply_chat_template` and `stream_decoder` over a `tokenizers.Tokenizer`.

    Attributes: `vocab_size` (largest id + 1), `bos_token_id`, `eos_token_id`, `pad_token_id` (None if there is none),
    `special_ids`, and `chat_template`, the source of the usual template or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        named: Mapping[str, str],
        templates: Mapping[str, str],
        source: str,
        chat_bos: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.source = source
        self.named_tokens = dict(named)
        self.chat_template = templates.get("default")
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ids = {name: self._id(token, name) for name, token in named.items()}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = map(ids.get, ("bos_token", "eos_token", "pad_token"))
        special = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special)
        self._control = ControlTokens(special.values())
        self._templates = dict(templates)
        self._compiled: dict[str, ChatTemplate] = {}
        self._plain: tokenizers.Tokenizer | None = None
        self._chat_bos = chat_bos

    def _id(self, token: str, name: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise GraniteError(f"{self.source}: {name} is {token!r}, which the vocabulary lacks; add it or correct {name}")
        return token_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint folder: tokenizer.json, and tokenizer_config.json with its companions."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise GraniteError(f"{path}: not found; a folder needs tokenizer.json beside config.json to tokenize text")
        config = _read_json(folder / "tokenizer_config.json")
        fallback = _read_json(folder / "special_tokens_map.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise GraniteError(f"{path}: tokenizers can't read it: {error}; fetch the file again") from error
        named = {}
        for name in _NAMED:
            value = config.get(name, fallback.get(name))
            if value is not None:
                named[name] = _content(value, folder / "tokenizer_config.json", name)
        _add_configured(backend, config, named, folder / "tokenizer_config.json")
        return cls(backend, named=named, templates=folder_templates(folder, config), source=str(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF") -> "Tokenizer":
        """The tokenizer in a GGUF's metadata; `source` names the file in errors."""
        backend = build_backend(metadata, source)
        tokens = metadata["tokenizer.ggml.tokens"]
        named = {name: tokens[token_id] for name, token_id in special_token_ids(metadata, source).items()}
        bos, eos = framing(metadata, source)
        first = [named["bos_token"]] if bos and "bos_token" in named else []
        last = [named["eos_token"]] if eos and "eos_token" in named else []
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys([*first, *last])],
        )
        templates = gguf_templates(metadata, source)
        return cls(backend, named=named, templates=templates, source=source, chat_bos=bool(first))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written in it are recognised, and those that go around a text are added."""
        if not isinstance(text, str):
            raise GraniteError(f"encode takes a str, not a {type(text).__name__}")
        return self.backend.encode(_encodable(text), add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids` (a list or a one-dimensional tensor); bytes that are no UTF-8 become U+FFFD."""
        numbers = [int(token_id) for token_id in ids]
        if any(not 0 <= token_id < 1 << 32 for token_id in numbers):
            raise GraniteError(f"decode takes ids from 0 to {self.vocab_size - 1}, and was given {min(numbers)} to {max(numbers)}")
        return self.backend.decode(numbers, skip_special_tokens=skip_special_tokens)

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A fresh decoder for one sequence: `push(id)` and, at the end, `finish()` return the text that is now sure."""
        return stream_decoder(self.backend, self.special_ids if skip_special_tokens else frozenset())

    @overload
    def apply_chat_template(self, messages: Sequence[Any], *, tokenize: Literal[True], **keywords: Any) -> list[int]: ...

    @overload
    def apply_chat_template(self, messages: Sequence[Any], *, tokenize: Literal[False] = False, **keywords: Any) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        chat_template: str | None = None,
        **template_arguments: Any,
    ) -> str | list[int]:
        """The prompt for `messages`: text as transformers renders it, or ids with `tokenize=True`.

        `chat_template` is the name of one of the checkpoint's templates or a template's text; other keywords are the
        template's own variables. In the ids, control tokens spelled out in the data stay text; the one that a replayed
        tool call begins with is kept. Raises GraniteError where there is no template or it refuses, fails or runs away.
        """
        refused = sorted(name for name in _NOT_OURS & template_arguments.keys() if template_arguments[name])
        if refused:
            raise GraniteError(f"apply_chat_template has no {', '.join(refused)}; it returns a text or a list of ids")
        template = self._template(tools, chat_template)
        data = {
            "messages": plain_messages(messages),
            "tools": plain_dicts(tools, "tools"),
            "documents": plain_dicts(documents, "documents"),
            **{name: plain_data(value, name) for name, value in template_arguments.items() if name not in _NOT_OURS},
        }
        fixed = {**self.named_tokens, "add_generation_prompt": add_generation_prompt}
        if not tokenize:
            return template.render({**fixed, **data})
        bare, heads = without_tool_call(data["messages"])
        marks = self._control.marks({**data, "messages": bare}, template.text)
        if marks is None:
            ids = self.encode(template.render({**fixed, **data}), add_special_tokens=False)
        else:
            marked = marks.mark({**data, "messages": bare})
            for message, head in zip(marked["messages"], heads, strict=True):
                if head:
                    message["content"] = head + message["content"]
            ids = []
            for control, piece in self._control.split(template.render({**fixed, **marked})):
                ids += [self._id(piece, "control token")] if control else self._encode_plain(marks.unmark(piece))
        if self._chat_bos and ids[:1] != [self.bos_token_id]:  # llama.cpp adds it where the template doesn't
            ids.insert(0, self._id(self.named_tokens["bos_token"], "bos_token"))
        return ids

    def _template(self, tools: Any, asked: str | None) -> ChatTemplate:
        text, where = choose_template(self._templates, tools, asked, self.source)
        if text not in self._compiled:
            self._compiled[text] = ChatTemplate(text, where)
        return self._compiled[text]

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of `text` with special tokens taken as the characters that they are written with."""
        if self._plain is None:
            # a second tokenizer, because the switch is a state of the whole object and others may be encoding with it
            self._plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
            self._plain.encode_special_tokens = True
        return self._plain.encode(_encodable(text), add_special_tokens=False).ids


def load_tokenizer(checkpoint: TokenizerSource) -> Tokenizer | None:
    """The tokenizer of an open checkpoint, or None where it holds none.

    Raises GraniteError if the tokenizer can't be read or has ids that the embedding lacks.
    """
    if checkpoint.kind == "gguf":
        if "tokenizer.ggml.model" not in checkpoint.gguf_metadata:
            return None
        tokenizer = Tokenizer.from_gguf(checkpoint.gguf_metadata, str(checkpoint.path))
    else:
        path = Path(checkpoint.path)
        folder = path if path.is_dir() else path.parent
        if not (folder / "tokenizer.json").is_file():
            return None
        tokenizer = Tokenizer.from_folder(folder)
    rows = checkpoint.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise GraniteError(
            f"{tokenizer.source}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding {rows} rows; "
            "use the tokenizer that the checkpoint was saved with"
        )
    return tokenizer


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which have no UTF-8 form and would be a TypeError in the tokenizer."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise GraniteError(f"{path}: is not valid JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise GraniteError(f"{path}: holds a {type(value).__name__}, and a JSON object was expected")
    return value


def _content(value: Any, path: Path, name: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise GraniteError(f"{path}: {name} must be a string, or an object with content, not {value!r}")
    return text


def _add_configured(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str], path: Path) -> None:
    """Add the tokens that only tokenizer_config.json declares, and mark as special those that it calls so."""
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict) or not all(key.isdigit() and isinstance(v, dict) for key, v in declared.items()):
        raise GraniteError(f"{path}: added_tokens_decoder must map ids to objects with content")
    for key, value in sorted(declared.items(), key=lambda item: int(item[0])):
        content = _content(value, path, f"added_tokens_decoder[{key}]")
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        backend.add_tokens([AddedToken(content, **{flag: bool(value[flag]) for flag in flags if flag in value})])
        found = backend.token_to_id(content)
        if found != int(key):
            raise GraniteError(
                f"{path}: added_tokens_decoder has {content!r} as {key}, and in tokenizer.json it is {found}; "
                "both files must be of one checkpoint"
            )
    extra = [*(config.get("additional_special_tokens") or ()), *(config.get("extra_special_tokens") or ())]
    for content in [*named.values(), *(_content(value, path, "additional_special_tokens") for value in extra)]:
        if backend.token_to_id(content) is None:
            raise GraniteError(f"{path}: names the special token {content!r}, which tokenizer.json lacks")
        backend.add_special_tokens([AddedToken(content, normalized=False, special=True)])
