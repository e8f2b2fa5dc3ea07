"""A `tokenizers.Tokenizer` from the metadata of a GGUF, tokenizing as llama.cpp does.

Byte-level BPE alone (`tokenizer.ggml.model = gpt2`): the vocabulary and merges are in the file, the rule that cuts a
text into words before merging is only named there (`tokenizer.ggml.pre`), and stands here. Some rules cut the text with
one expression after another, each inside the pieces of the one before: there a GGUF and a tokenizer.json can differ.
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from granite_kernels.errors import GraniteError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Rule -> its expressions, applied one inside the other.
_DIGITS_APART = (r"\p{N}", _GPT2)
_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "refact": _DIGITS_APART,
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "llama-bpe": (_CL100K % "{1,3}",),
    "qwen2": (_CL100K % "",),
}
_ALIASES = {
    "codeshell": "starcoder",
    "command-r": "starcoder",
    "deepseek-r1-qwen": "qwen2",
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
}
# These take a word that is itself in the vocabulary whole, and begin with the bos token unless the file says otherwise.
_WHOLE_WORDS = frozenset({"llama-bpe"})


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type` that matter here."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


def build_backend(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that `metadata` (raw GGUF keys, arrays as lists) describes; `source` names the file in errors."""
    rule = _rule(metadata, source)
    tokens = _strings(metadata, "tokenizer.ggml.tokens", source)
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if vocabulary[token] != token_id)
        raise GraniteError(f"{source}: tokenizer.ggml.tokens has {twice!r} twice; each token must have one id")
    pairs = (merge.partition(" ") for merge in _strings(metadata, "tokenizer.ggml.merges", source))
    merges = [(left, right) for left, _, right in pairs]
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in _WHOLE_WORDS)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise GraniteError(f"{source}: tokenizer.ggml.merges don't fit tokenizer.ggml.tokens: {error}") from error
    backend = Tokenizer(model)
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _EXPRESSIONS[rule]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, metadata, tokens, source)
    return backend


def special_token_ids(metadata: Mapping[str, Any], source: str) -> dict[str, int]:
    """The ids behind the names bos_token, eos_token, pad_token and unk_token, as far as the file gives them."""
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    found = {}
    count = len(metadata["tokenizer.ggml.tokens"])
    for name, stem in keys.items():
        key = f"tokenizer.ggml.{stem}_token_id"
        token_id = metadata.get(key)
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < count:
            raise GraniteError(f"{source}: {key} is {token_id!r}, and the vocabulary has the ids 0 to {count - 1}")
        found[name] = token_id
    return found


def framing(metadata: Mapping[str, Any], source: str) -> tuple[bool, bool]:
    """Whether a text begins with the bos token and ends with the eos token, as the file or else the rule has it."""
    bos = metadata.get("tokenizer.ggml.add_bos_token", _rule(metadata, source) in _WHOLE_WORDS)
    return bool(bos), bool(metadata.get("tokenizer.ggml.add_eos_token", False))


def _rule(metadata: Mapping[str, Any], source: str) -> str:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise GraniteError(f"{source}: tokenizer.ggml.model is {kind!r}; supported is 'gpt2' (byte-level BPE)")
    named = metadata.get("tokenizer.ggml.pre", "default")
    rule = _ALIASES.get(str(named), str(named))
    if rule not in _EXPRESSIONS:
        known = ", ".join(sorted([*_EXPRESSIONS, *_ALIASES]))
        raise GraniteError(f"{source}: tokenizer.ggml.pre is {named!r}, an unknown pre-tokenizer; supported are {known}")
    return rule


def _strings(metadata: Mapping[str, Any], key: str, source: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        found = "missing" if values is None else f"a {type(values).__name__}, not an array of strings"
        raise GraniteError(f"{source}: {key} is {found}; convert the checkpoint again")
    return list(values)


def _add_special(backend: Tokenizer, metadata: Mapping[str, Any], tokens: list[str], source: str) -> None:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return
    if not isinstance(types, list | tuple) or len(types) != len(tokens):
        found = f"{len(types)} entries" if isinstance(types, list | tuple) else f"the value {types!r}"
        raise GraniteError(f"{source}: tokenizer.ggml.token_type has {found}, and there are {len(tokens)} tokens")
    of_type: dict[int, list[AddedToken]] = {TokenType.UNKNOWN: [], TokenType.CONTROL: [], TokenType.USER_DEFINED: []}
    for token, kind in zip(tokens, types, strict=True):
        if kind in of_type and token:
            of_type[kind].append(AddedToken(token, normalized=False, special=kind != TokenType.USER_DEFINED))
    backend.add_special_tokens(of_type[TokenType.CONTROL] + of_type[TokenType.UNKNOWN])
    backend.add_tokens(of_type[TokenType.USER_DEFINED])
