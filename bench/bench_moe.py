"""The router and the experts of a mixture: of its matrices only the chosen experts' move."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from granite_kernels.bench.harness import Case, Inputs, Rival
from granite_kernels.bench.rivals import grouped
from granite_kernels.bench.shapes import Cost, Setting
from torch import Tensor

from granite_kernels.reference.swiglu import swiglu

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def gate_up_by_groups(product: Product, x: Tensor, matrices: Tensor, chosen: Tensor, *, experts: int) -> Tensor:
    """experts_gate_up_swiglu over a grouped product."""
    order = chosen.flatten().argsort()
    sorted_inner = swiglu(product(x.flatten(0, -2)[order // chosen.shape[-1]], matrices, chosen))
    return torch.empty_like(sorted_inner).index_copy_(0, order, sorted_inner).view(*chosen.shape, -1)


def down_by_groups(
    product: Product, inner: Tensor, matrices: Tensor, chosen: Tensor, shares: Tensor, residual: Tensor, *, scale: float
) -> Tensor:
    """experts_down_add over a grouped product."""
    order = chosen.flatten().argsort()
    found = product(inner.flatten(0, 2)[order], matrices, chosen)
    found = torch.empty_like(found).index_copy_(0, order, found).view(*chosen.shape, -1)
    return residual + (found * shares.to(found.dtype)[..., None]).sum(dim=2) * scale


def cases(setting: Setting) -> list[Case]:
    config, tokens = setting.config, setting.tokens
    if not config.is_moe:
        return []
    hidden, inner, experts, top_k = config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok
    x, norm, size = setting.normal(*setting.shape, hidden), setting.normal(hidden, seed=1), setting.dtype.itemsize
    router = setting.normal(experts, hidden, scale=hidden**-0.5, seed=2)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    distinct = chosen.unique().numel()
    chosen = chosen.view(*setting.shape, top_k).int().to(setting.device)
    shares = torch.rand(chosen.shape, generator=generator).softmax(-1).to(setting.device)
    gate_up, down = setting.weight(experts * 2 * inner, hidden), setting.weight(experts * hidden, inner)
    products = setting.normal(*chosen.shape, inner, seed=4)
    residual = setting.normal(*setting.shape, hidden, seed=5)
    layers = config.num_hidden_layers if setting.decoding else 0

    def case(op: str, size: str, inputs: Inputs, cost: Cost, *rivals: Rival, packs: bool = True) -> Case:
        return Case(op, "moe", size, setting, inputs, cost, rivals, role=op if layers else "", times=layers, compiles=False, packs=packs)

    route = case(
        "norm_route",
        f"{hidden} -> {top_k} of {experts}",
        Inputs((x, norm, router), {"top_k": top_k, "eps": config.rms_norm_eps}),
        Cost(size * (experts * hidden + hidden + 2 * tokens * hidden) + 8 * tokens * top_k, 2 * tokens * hidden * experts),
        packs=False,
    )
    route = dataclasses.replace(route, results=lambda result, inputs: [result[0], result[2]])  # experts that tie may change places
    up = case(
        "experts_gate_up_swiglu",
        f"{hidden} -> {distinct} of {experts} x {2 * inner}",
        Inputs((x, gate_up, chosen), {"experts": experts}),
        Cost(
            gate_up.nbytes * distinct // experts + size * tokens * (hidden + top_k * inner) + 4 * tokens * top_k,
            4 * tokens * top_k * hidden * inner,
        ),
        grouped(experts, gate_up_by_groups),
    )
    combined = case(
        "experts_down_add",
        f"{distinct} of {experts} x {inner} -> {hidden}",
        Inputs((products, down, chosen, shares, residual), {"scale": config.residual_multiplier}),
        Cost(
            down.nbytes * distinct // experts + size * tokens * (top_k * inner + 2 * hidden) + 8 * tokens * top_k,
            2 * tokens * top_k * hidden * inner,
        ),
        grouped(experts, down_by_groups),
    )
    return [route, up, combined]


def test_moe(measured: Callable[[], None]) -> None:
    measured()
