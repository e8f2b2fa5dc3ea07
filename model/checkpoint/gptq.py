"""GPTQ (v1 and v2) and AWQ.

    GPTQ   qweight int32 [columns * bits / 32, rows], element k of a word at bit bits * k, packed along the columns; scales [groups, rows];
           qzeros int32 [groups, rows * bits / 32], packed along the rows: the zero point less one in v1, itself in v2; g_idx [columns]
    AWQ    qweight int32 [columns, rows / 8], qzeros int32 [groups, rows / 8], nibble k of word c being row 8c + (0,2,4,6,1,3,5,7)[k]

    value = (q - zero) * scale

Sources: github.com/AutoGPTQ/AutoGPTQ, ModelCloud/GPTQModel, casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from granite_kernels.errors import GraniteError

from .base import DENSE_FORMATS
from .prequantized import (
    INTEGERS,
    WORDS,
    Coded,
    Infos,
    Prequantized,
    Read,
    Tensors,
    act_order,
    check_groups,
    check_shape,
    format_for,
    unpack_words,
)

AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles of a word, lowest first


class Gptq(Prequantized):
    """See the module's text."""

    kinds: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx", "bias")
    types: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qweight": WORDS,
        "qzeros": WORDS,
        "scales": DENSE_FORMATS,
        "g_idx": INTEGERS,
        "bias": DENSE_FORMATS,
    }

    def __init__(self, settings: Mapping[str, Any], path: Path, dtype: torch.dtype) -> None:
        super().__init__(settings, path, dtype)
        self._bits = settings.get("bits", settings.get("w_bit", 4))
        if self._bits not in (4, 8):
            self.refuse(f"{self._bits!r} bits", "4 or 8")
        version = settings.get("checkpoint_format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            self.refuse(f"the checkpoint_format {version!r}", "gptq or gptq_v2")
        self._less_one = version == "gptq"

    def is_packed(self, infos: Infos) -> bool:
        return "qweight" in infos

    def size(self, words: tuple[int, ...]) -> tuple[int, int]:
        """rows and columns of a qweight of this shape."""
        return words[1], words[0] * 32 // self._bits

    def shape(self, module: str, infos: Infos, read: Read) -> tuple[int, ...]:
        weight, scales, zeros = infos["qweight"], infos.get("scales"), infos.get("qzeros")
        if scales is None or zeros is None or len(weight.shape) != 2 or not scales.shape:
            raise GraniteError(f"{weight.file}: {module} is packed, but has no scales and qzeros, or no matrix of words; download it again")
        rows, columns = self.size(weight.shape)
        check_groups(scales, scales.shape[0], columns)
        check_shape(module, scales, (scales.shape[0], rows))
        check_shape(module, zeros, (scales.shape[0], -(-rows * self._bits // 32)))
        if "g_idx" in infos:
            check_shape(module, infos["g_idx"], (columns,))
        return rows, columns

    def format(self, infos: Infos, shape: tuple[int, ...], read: Read) -> str | None:
        groups = infos["scales"].shape[0]
        if "g_idx" in infos and act_order(read(infos["g_idx"]), shape[1], groups) is not None:
            return None
        return format_for(shape[1], groups, self._bits, zero=not self.settings.get("sym", True))

    def decode(self, tensors: Tensors, shape: tuple[int, ...]) -> Coded:
        self.check_bias(tensors)
        rows, columns = shape
        codes = unpack_words(tensors["qweight"].T, self._bits)
        zero = unpack_words(tensors["qzeros"], self._bits)[:, :rows].T
        if self._less_one:
            zero = zero.add(1).bitwise_and((1 << self._bits) - 1)
        order = act_order(tensors.get("g_idx"), columns, tensors["scales"].shape[0])
        return Coded(codes, tensors["scales"].T, zero, self._bits, order)

    def check_bias(self, tensors: Tensors) -> None:
        """A bias of zeros, which some packers add, is none."""
        if "bias" in tensors and bool(tensors["bias"].any()):
            self.refuse("that a module with a bias is packed", "none; projections with a bias aren't supported")


class Awq(Gptq):
    """AWQ in the layout "gemm": 4 bits with zero points."""

    kinds = ("qweight", "qzeros", "scales", "bias")

    def __init__(self, settings: Mapping[str, Any], path: Path, dtype: torch.dtype) -> None:
        super().__init__({**settings, "sym": False}, path, dtype)
        version = str(settings.get("version", "gemm")).lower()
        if self._bits != 4 or version != "gemm":
            self.refuse(f"{self._bits} bits in the version {version!r}", "4 bits in gemm")

    def size(self, words: tuple[int, ...]) -> tuple[int, int]:
        return 8 * words[1], words[0]

    def decode(self, tensors: Tensors, shape: tuple[int, ...]) -> Coded:
        self.check_bias(tensors)
        place = torch.tensor(AWQ_ROWS).argsort()
        codes, zero = (
            unpack_words(tensors[kind], 4).view(tensors[kind].shape[0], -1, 8)[..., place].flatten(1).T for kind in ("qweight", "qzeros")
        )
        return Coded(codes.contiguous(), tensors["scales"].T, zero, 4)
