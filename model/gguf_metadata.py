"""What a GGUF says beside its tensors: the configuration and the tokenizer, under llama.cpp's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .config import GraniteConfig
from .config_sources import gguf_keys
from .gguf_tokenizer import TokenType
from .tokenizer import Tokenizer

FLOATS = ("rms_norm_eps", "rope_theta", "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
FILE_TYPES = {None: 0, "q8_0": 7, "q4_k_m": 15, "q6_k": 18}  # llama.cpp's LLAMA_FTYPE
UNUSED = 5  # the type of an id without a token
Pairs = dict[str, Any]


def architecture_of(config: GraniteConfig) -> str:
    """The name of the architecture in a GGUF."""
    return "granitemoe" if config.architecture == "granitemoeshared" else config.architecture


def config_pairs(config: GraniteConfig, quantization: str | None) -> Pairs:
    """The keys of the configuration, of the rotation and of the file's type."""
    prefix = architecture_of(config)
    pairs: Pairs = {}
    for field, key in gguf_keys(config.architecture).items():
        value = getattr(config, field, None)
        neutral = config.architecture == "llama" and field in FLOATS[2:]
        if value and not neutral:
            pairs[key] = float(value) if field in FLOATS else value
    pairs[f"{prefix}.rope.dimension_count"] = config.head_dim
    pairs[f"{prefix}.attention.value_length"] = config.head_dim
    return {**pairs, "general.file_type": FILE_TYPES[quantization], "general.quantization_version": 2}


def tokenizer_pairs(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Pairs | None:
    """The keys of the tokenizer: a GGUF's own, or a folder's put into its words; None where they can't say what the folder does."""
    if checkpoint.kind == "gguf":
        return {key: value for key, value in checkpoint.gguf_metadata.items() if key.startswith("tokenizer.")}
    if tokenizer is None:
        return {}
    content = json.loads(Path(checkpoint.path, "tokenizer.json").read_bytes())
    rule, model = _rule(content.get("pre_tokenizer")), content.get("model", {})
    if rule is None or content.get("normalizer") is not None or model.get("type", "BPE") != "BPE" or model.get("ignore_merges"):
        return None
    tokens, types = _tokens(tokenizer, checkpoint.config.vocab_size)
    pairs = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.add_bos_token": tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id],
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    eos = dict.fromkeys((*checkpoint.config.eos_token_id, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])))
    for stem, token in (
        ("bos", tokenizer.bos_token_id if tokenizer.bos_token_id is not None else checkpoint.config.bos_token_id),
        *zip(("eos", "eot"), eos, strict=False),
        ("padding", tokenizer.pad_token_id if tokenizer.pad_token_id is not None else checkpoint.config.pad_token_id),
    ):
        pairs[f"tokenizer.ggml.{stem}_token_id"] = token
    return {key: value for key, value in pairs.items() if value is not None}


def _tokens(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """The text and the type of each id below `size`."""
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
    for index, added in tokenizer.backend.get_added_tokens_decoder().items():
        types[index] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    return tokens, types


def _rule(found: Any) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts text into words; None where it has none that is the same."""
    steps = found.get("pretokenizers", [found]) if isinstance(found, dict) else []
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space") or not steps[-1].get("use_regex", True):
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    return "refact" if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") else None
