"""What a call of `generate` asks for, checked before anything is launched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from granite_kernels.errors import GraniteError

from .config import GraniteConfig
from .step import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of prompts and how to go on. ids int64 [batch, tokens] and present bool alike live on the model's device."""

    ids: Tensor
    present: Tensor
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos: frozenset[int]
    pad: int
    stop: tuple[str, ...]

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def prompt_tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def padded(self) -> bool:
        return not bool(self.present.all())


def check_ids(input_ids: Any, vocab: int) -> Tensor:
    """Token ids as int64 [batch, tokens] on the CPU or where they were; lists are taken too."""
    if not isinstance(input_ids, Tensor):
        rows: Sequence[Any] = input_ids
        if len(rows) and not isinstance(rows[0], int):
            lengths = sorted({len(row) for row in rows})
            if len(lengths) > 1:
                raise GraniteError(
                    f"the prompts are {lengths[0]} to {lengths[-1]} tokens long; pad them on the left to one length and pass attention_mask"
                )
        input_ids = torch.tensor(rows, dtype=torch.int64)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise GraniteError(f"input_ids are {input_ids.dtype}, expected integers")
    ids = input_ids.long()
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2:
        raise GraniteError(f"input_ids have shape {tuple(input_ids.shape)}, expected [batch, tokens]")
    if ids.numel() == 0:
        raise GraniteError("the prompt is empty: at least one token is needed")
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocab:
        raise GraniteError(f"token id {low if low < 0 else high} is outside the vocabulary, 0 to {vocab - 1}")
    return ids


def check_mask(attention_mask: Any, shape: Sequence[int]) -> Tensor:
    """The mask as bool: every row is zeros, then ones, ending in a one."""
    mask = torch.as_tensor(attention_mask)
    mask = mask[None] if mask.dim() == 1 else mask
    if tuple(mask.shape) != tuple(shape):
        raise GraniteError(f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(shape)}")
    present = mask.bool()
    if not bool(present[:, -1].all()) or bool((present[:, :-1] & ~present[:, 1:]).any()):
        raise GraniteError("attention_mask has a zero behind a one: prompts are padded on the left only")
    return present


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise GraniteError(f"{name} is {value!r}, expected a number")
    if value < low or value > high or (open_low and value == low):
        span = f"more than {low:g}" if open_low else f"at least {low:g}"
        raise GraniteError(f"{name} is {value!r}, expected {span}" + (f" and at most {high:g}" if math.isfinite(high) else ""))
    return float(value)


def _whole(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise GraniteError(f"{name} is {value!r}, expected a whole number of at least {low}")
    return value


def make_request(
    config: GraniteConfig,
    device: torch.device,
    input_ids: Any,
    *,
    limit: int,
    attention_mask: Any = None,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    stop: str | Sequence[str] | None = None,
) -> Request:
    """Check the arguments of `generate`; `limit` is the longest context that the model may use."""
    ids = check_ids(input_ids, config.vocab_size)
    batch, tokens = ids.shape
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    if attention_mask is None:
        starts_padded = ids[:, 0] == pad
        if batch > 1 and config.pad_token_id is not None and bool(starts_padded.any()) and not bool(starts_padded.all()):
            raise GraniteError(
                f"some rows of the batch begin with the padding token {pad}: pass attention_mask, zero where a row is padded"
            )
        present = torch.ones_like(ids, dtype=torch.bool)
    else:
        present = check_mask(attention_mask, ids.shape)
    _whole("max_new_tokens", max_new_tokens, 1)
    if tokens + max_new_tokens > limit:
        raise GraniteError(
            f"{tokens} prompt tokens and {max_new_tokens} new ones need a context of {tokens + max_new_tokens}, the model has {limit}: "
            "shorten the prompt or lower max_new_tokens"
        )
    _number("temperature", temperature, 0.0, math.inf)
    _whole("top_k", top_k, 0)
    _number("top_p", top_p, 0.0, 1.0, open_low=True)
    penalty = _number("repetition_penalty", repetition_penalty, 0.0, math.inf, open_low=True)
    eos: Iterable[int] = (
        config.eos_token_id if eos_token_id is None else ([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    )
    if seed is None:
        seed = int(torch.randint(2**62, ()))  # follows torch.manual_seed, as in transformers
    return Request(
        ids=ids.to(device),
        present=present.to(device),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(float(temperature), top_k, float(top_p), penalty) if do_sample else Sampling(repetition_penalty=penalty),
        seed=_whole("seed", seed, 0),
        eos=frozenset(eos),
        pad=pad,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
    )
