"""What the accelerated modules of one model share: the backend, its operations, and what a forward pass computes once for all layers."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.fallback import Guarded
from granite_kernels.ops import Ops, choose, why_not_triton
from granite_kernels.workspace import Workspace

from ..config import GraniteConfig
from .window import Window, causal, masked

STEPS = {"rms_norm": "norm", "linear": "linear", "rope_append": "rope"}  # operation: its file


@dataclasses.dataclass(frozen=True)
class Kit:
    """The operations for one device and dtype: those of a whole layer, and the steps that a module alone needs."""

    ops: Ops
    rms_norm: Any
    linear: Any
    rope_append: Any


class Session:
    """The state behind one accelerated model. `config` has its sizes; None, for functions that any model may call: no scratch is kept."""

    def __init__(self, backend: str, config: GraniteConfig | None = None) -> None:
        self.backend, self.config = backend, config
        self.active = True  # False: restored, while another library's wrapper still holds one of our forwards
        self.notes: list[str] = []  # what had to be left to transformers since, each once
        self._kit: tuple[tuple[torch.device, torch.dtype], Kit] | None = None
        self._window: tuple[Any, Any, Window | None] | None = None  # mask, sizes, window
        self._rotary: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session(self.backend, self.config)

    # ------------------------------------------------------------------ operations

    def why_not_triton(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why plain PyTorch runs under this backend; None where Triton does."""
        if self.backend == "torch":
            return "asked for"
        reason = why_not_triton(device, dtype)
        if reason is None and self.config is not None and (self.config.head_dim < 16 or self.config.head_dim & (self.config.head_dim - 1)):
            reason = f"kernels take heads of 16, 32, 64 .. values, not of {self.config.head_dim}"
        if reason is None and self.backend == "auto" and device.type != "cuda":
            reason = "the interpreter is for tests; ask for backend='triton'"
        return reason

    def kit(self, like: Tensor) -> Kit:
        """The operations for where `like` is; chosen again when the model has moved. Raises GraniteError."""
        key = (like.device, like.dtype)
        if self._kit is None or self._kit[0] != key:
            self._kit = (key, self._choose(like))
        return self._kit[1]

    def _choose(self, like: Tensor) -> Kit:
        reason = self.why_not_triton(like.device, like.dtype)
        if reason is not None and self.backend == "triton":
            raise GraniteError(f"backend 'triton' can't be honoured: {reason}; use backend='auto' or 'torch'")
        workspace = None
        if reason is None and self.config is not None:
            from ..scratch import workspace_size  # brings triton

            workspace = Workspace.allocate(*workspace_size(self.config, like), like.device)
        backend = "torch" if reason is not None else self.backend
        moe = self.config is not None and self.config.is_moe
        steps: dict[str, Any] = {
            name: getattr(importlib.import_module(f"granite_kernels.reference.{file}"), name) for name, file in STEPS.items()
        }
        if reason is None:
            for name, file in STEPS.items():
                kernel = getattr(importlib.import_module(f"granite_kernels.kernels.{file}"), name)
                steps[name] = Guarded(name, kernel, steps[name], strict=self.backend == "triton")
        return Kit(choose(backend, like.device, like.dtype, moe=moe, workspace=workspace), **steps)

    # ------------------------------------------------------------------ once for all layers

    def note(self, text: str) -> None:
        """Something is left to transformers: an error under an explicit backend, else kept for `status`."""
        if self.backend != "auto":
            raise GraniteError(f"backend {self.backend!r} can't be honoured: {text}; use backend='auto'")
        if text not in self.notes:
            self.notes.append(text)

    def window(self, mask: Any, held: int | Tensor, batch: int, tokens: int, device: torch.device) -> Window | None:
        """What the queries see, computed for the first layer that asks and kept for the others; None for a mask that no kernel takes."""
        if mask is None and isinstance(held, Tensor):
            return causal(held, batch, device)
        key = (
            (held, 0, batch, tokens, device)
            if mask is None
            else (0, mask._version if isinstance(mask, Tensor) else 0, batch, tokens, device)
        )
        if self._window is None or self._window[0] is not mask or self._window[1] != key:
            self._window = (mask, key, causal(held, batch, device) if mask is None else masked(mask, batch, tokens))
        return self._window[2]

    def rotary(self, embeddings: tuple[Tensor, Tensor], batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """transformers' cos and sin [batch or 1, tokens, head_dim] as our table [.., head_dim], positions int32 [batch, tokens] in
        it, and int32 zeros [batch], the lengths of a cache that is empty yet.
        """
        cos, sin = embeddings
        if self._rotary is None or self._rotary[0] is not cos or self._rotary[1][2].shape[0] != batch:
            half = cos.shape[-1] // 2
            table = torch.cat((cos[..., :half], sin[..., :half]), dim=-1).flatten(0, 1)
            rows = torch.arange(table.shape[0], dtype=torch.int32, device=cos.device).view(cos.shape[:2])
            empty = torch.zeros(batch, dtype=torch.int32, device=cos.device)
            self._rotary = (cos, (table, rows.expand(batch, -1).contiguous(), empty))
        return self._rotary[1]
