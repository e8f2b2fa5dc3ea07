"""GGUF files byte by byte, so that any of them can be wrong."""

from __future__ import annotations

import math
import struct
from typing import Any

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", 5: "i", F32: "f", BOOL: "B", U64: "Q", 11: "q", 12: "d"}
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210), 16: (256, 66), 30: (1, 2)}


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def pair(key: str | bytes, kind: int, value: Any) -> bytes:
    """A key-value pair; `value` may also be the raw bytes of the value."""
    if not isinstance(value, bytes):
        value = string(value) if kind == STRING else struct.pack("<" + _CODES[kind], value)
    return string(key) + u32(kind) + value


def strings(key: str, values: list[str]) -> bytes:
    return pair(key, ARRAY, u32(STRING) + u64(len(values)) + b"".join(map(string, values)))


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    """An entry of the tensor table; `shape` is logical, outermost first."""
    count = len(shape) if dimensions is None else dimensions
    return string(name) + u32(count) + b"".join(map(u64, reversed(shape))) + u32(kind) + u64(offset)


def size(shape: tuple[int, ...], kind: int) -> int:
    block, block_bytes = BLOCKS[kind]
    return math.prod(shape) // block * block_bytes


def header(
    pairs: list[bytes],
    tensors: list[bytes],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    pair_count: int | None = None,
) -> bytes:
    counts = u64(len(tensors) if tensor_count is None else tensor_count) + u64(len(pairs) if pair_count is None else pair_count)
    return magic + u32(version) + counts + b"".join(pairs) + b"".join(tensors)


def padded(raw: bytes, alignment: int = 32) -> bytes:
    return raw + bytes(-len(raw) % alignment)


HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 64, 96, 4, 2, 99


def metadata(architecture: str = "granite", **other: tuple[int, Any]) -> list[bytes]:
    """What a tiny model of one layer needs."""
    values: dict[str, tuple[int, Any]] = {
        "block_count": (U32, 1),
        "context_length": (U32, 128),
        "embedding_length": (U32, HIDDEN),
        "feed_forward_length": (U32, INNER),
        "attention.head_count": (U32, HEADS),
        "attention.head_count_kv": (U32, KV_HEADS),
        "attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "rope.freq_base": (F32, 1e4),
    }
    if architecture != "llama":
        values |= {
            "attention.scale": (F32, 1 / 16),
            "embedding_scale": (F32, 12.0),
            "residual_scale": (F32, 0.22),
            "logit_scale": (F32, 6.0),
        }
    found = [pair("general.architecture", STRING, architecture)]
    return found + [pair(f"{architecture}.{key}", *value) for key, value in (values | other).items()]


Tensors = dict[str, tuple[tuple[int, ...], int]]


def attention(kind: int = 0) -> Tensors:
    """Name -> shape and type of what every architecture has; `kind` is that of the matrices."""
    keys = HIDDEN // HEADS * KV_HEADS
    return {
        "token_embd.weight": ((VOCAB, HIDDEN), kind),
        "blk.0.attn_norm.weight": ((HIDDEN,), 0),
        "blk.0.attn_q.weight": ((HIDDEN, HIDDEN), kind),
        "blk.0.attn_k.weight": ((keys, HIDDEN), kind),
        "blk.0.attn_v.weight": ((keys, HIDDEN), kind),
        "blk.0.attn_output.weight": ((HIDDEN, HIDDEN), kind),
        "blk.0.ffn_norm.weight": ((HIDDEN,), 0),
        "output_norm.weight": ((HIDDEN,), 0),
    }


def dense(kind: int = 0) -> Tensors:
    """The tensors of a dense model."""
    inner = {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    return attention(kind) | {f"blk.0.{name}.weight": (shape, kind) for name, shape in inner.items()}


def model(
    pairs: list[bytes] | None = None, tensors: Tensors | None = None, data: dict[str, bytes] | None = None, *, alignment: int = 32
) -> bytes:
    """A whole file, by default that of the tiny dense Granite; tensors are zero but for those in `data`."""
    table, body = [], b""
    for name, (shape, kind) in (dense() if tensors is None else tensors).items():
        table.append(tensor(name, shape, kind, len(body)))
        body = padded(body + (data or {}).get(name, bytes(size(shape, kind))), alignment)
    return padded(header(metadata() if pairs is None else pairs, table), alignment) + body
