"""What runs for each module of a model: the rows that `granite_kernels.status` prints."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..loading import Table
from .layer import Forward, why_not_experts
from .models import activation_is_silu, causal_lm, moe_of, shared_of, sizes, why_not, why_not_linear
from .session import STEPS, Session

STOCK = "transformers"
NAME = "granite_kernels"  # of our functions in transformers' tables of implementations
GRADIENTS = "(training, gradients)"
UNTOUCHED = "accelerate was not called, or restore was"
EXPERTS = ("experts_gate_up_swiglu", "experts_down_add")


@dataclasses.dataclass(frozen=True)
class Row:
    """What runs for a module: `active` says whether it is a Triton kernel, `reason` why not. Equal layers share a row: layers.0-39."""

    module: str
    kernel: str
    active: bool
    reason: str


class Rows:
    """Makes the rows of one model from the roles that its modules play now."""

    def __init__(self, session: Session, like: Any) -> None:
        kit = session.kit(like)
        why = session.why_not_triton(like.device, like.dtype)
        self.kernels = {choice.role: (choice.kernel, choice.active, choice.reason) for choice in kit.ops.choices}
        for name, file in STEPS.items():
            reason = getattr(getattr(kit, name), "reason", None)  # of a kernel that turned out not to compile
            side = "kernels" if why is None and reason is None else "reference"
            self.kernels[name] = (f"{side}.{file}.{name}", side == "kernels", reason or "")
        if why is not None:
            self.kernels = {role: (kernel, False, why) for role, (kernel, _, _) in self.kernels.items()}

    def row(self, module: str, role: str, reason: str | None = None) -> Row:
        """`role` runs for the module, or transformers for the `reason`."""
        return Row(module, *self.kernels[role]) if reason is None else Row(module, STOCK, False, reason)

    def layer(self, layer: Any) -> list[Row]:
        rows = self._attention(layer)
        norm = layer.post_attention_layernorm
        if moe_of(layer) is None:
            names = {f"mlp.{name}": getattr(layer.mlp, name) for name in ("gate_proj", "up_proj")}
            whole = why_not(layer.mlp) or (None if activation_is_silu(layer.mlp) else "its activation isn't SiLU")
            fused = self._fused(names, norm, whole)
            rows.append(self._norm("post_attention_layernorm", norm, "norm_gate_up_swiglu" if fused is None else "rms_norm"))
            rows += self._linears(names, "norm_gate_up_swiglu", fused)
            return [*rows, self.row("mlp.down_proj", "linear_add", fused or why_not_linear(layer.mlp.down_proj))]
        return rows + self._experts(layer, norm)

    def _attention(self, layer: Any) -> list[Row]:
        attention, norm = layer.self_attn, layer.input_layernorm
        names = {f"self_attn.{name}": getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")}
        whole = why_not(attention)
        fused = self._fused(names, norm, whole)
        role = "norm_qkv_rope_append" if fused is None else "rms_norm"
        first = self.row("input_layernorm", role, whole) if whole else self._norm("input_layernorm", norm, role)
        return [
            first,
            *self._linears(names, "norm_qkv_rope_append", fused),
            self.row("self_attn", "attention", whole),
            self.row("self_attn.o_proj", "linear_add", whole or why_not_linear(attention.o_proj)),
        ]

    def _experts(self, layer: Any, norm: Any) -> list[Row]:
        moe, shared = moe_of(layer), shared_of(layer)
        parts = {"block_sparse_moe": why_not(moe), "block_sparse_moe.router": why_not(moe.router), "its norm": why_not(norm)}
        parts["block_sparse_moe.experts"] = why_not_experts(moe.experts)
        whole = next((f"{name}: {reason}" for name, reason in parts.items() if reason is not None), None)
        rows = [self._norm("post_attention_layernorm", norm, "norm_route" if whole is None else "rms_norm")]
        rows.append(self.row("block_sparse_moe.router", "norm_route", whole))
        rows += [self.row("block_sparse_moe.experts", role, whole) for role in EXPERTS]
        if shared is not None:
            reasons = (whole, why_not(shared), *map(why_not_linear, (shared.input_linear, shared.output_linear)))
            reason = next((reason for reason in reasons if reason is not None), None)
            rows += [self.row("shared_mlp.input_linear", "norm_gate_up_swiglu", reason)]
            rows += [self.row("shared_mlp.output_linear", "linear_add", reason)]
        return rows

    def _norm(self, name: str, norm: nn.Module, role: str) -> Row:
        return self.row(name, role, why_not(norm))

    def _fused(self, names: dict[str, Any], norm: nn.Module, whole: str | None) -> str | None:
        """Why the norm and these projections aren't one launch."""
        if whole is not None:
            return whole
        reasons = {name: why_not_linear(module) for name, module in names.items()} | {"its norm": why_not(norm)}
        return next((f"{name}: {reason}" for name, reason in reasons.items() if reason is not None), None)

    def _linears(self, names: dict[str, Any], role: str, fused: str | None) -> list[Row]:
        return [self.row(name, role, fused and (why_not_linear(module) or fused)) for name, module in names.items()]


def status(model: Any) -> Table[Row]:
    lm = causal_lm(model)
    layers = list(lm.model.layers)
    sessions = [forward.session for module in lm.modules() if isinstance(forward := module.__dict__.get("forward"), Forward)]
    if not sessions:
        return Table([*_by_name(lm), Row("model", STOCK, False, UNTOUCHED)])
    maker = Rows(sessions[0], lm.model.norm.weight)
    rows = _grouped([_of_layer(maker, layer) for layer in layers])
    for name, module, role in (("model.norm", lm.model.norm, "rms_norm"), ("lm_head", lm.lm_head, "linear")):
        reason = why_not_linear(module) if name == "lm_head" else why_not(module)
        rows.append(maker.row(name, role, reason or (None if _ours(module) else UNTOUCHED)))
    rows += [Row("(some calls)", STOCK, False, note) for note in sessions[0].notes]
    return Table(
        [*rows, Row(GRADIENTS, STOCK, False, "kernels have no backward: the stock forward runs where a gradient may be asked for")]
    )


def _by_name(lm: Any) -> list[Row]:
    """What runs because the model was loaded with our implementations by name."""
    maker, rows = Rows(Session("auto", sizes(lm)), lm.model.norm.weight), []
    if lm.config._attn_implementation == NAME:
        rows.append(maker.row("model.layers.*.self_attn", "attention"))
    if lm.config._experts_implementation == NAME and moe_of(lm.model.layers[0]) is not None:
        reason = why_not_experts(moe_of(lm.model.layers[0]).experts)
        rows += [maker.row("model.layers.*.block_sparse_moe.experts", role, reason) for role in EXPERTS]
    return rows


def _ours(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), Forward)


def _of_layer(maker: Rows, layer: Any) -> list[Row]:
    rows = maker.layer(layer)
    if _ours(layer):
        return rows
    return [Row(row.module, STOCK, False, why_not(layer) or UNTOUCHED) for row in rows]


def _grouped(layers: list[list[Row]]) -> list[Row]:
    """One row for each run of layers in which a module has the same row."""
    found: list[Row] = []
    for rows in zip(*layers, strict=True):
        begin = 0
        for index in range(1, len(rows) + 1):
            if index == len(rows) or rows[index] != rows[begin]:
                span = f"{begin}" if index == begin + 1 else f"{begin}-{index - 1}"
                found.append(dataclasses.replace(rows[begin], module=f"model.layers.{span}.{rows[begin].module}"))
                begin = index
    return found
