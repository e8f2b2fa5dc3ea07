"""x @ weight.T alone and fused with its neighbours, for the few tokens of a decode step; larger products are composed.

Five launches a layer: the norm and the rotation, the residual, SwiGLU and the division of the logits happen in the program that
holds the numbers, so that between two matrices only [tokens, hidden] values pass through memory. The bytes of a launch are those
of its matrix, once, plus a few per cent (granite_kernels/linear/body.py). Sums are float32 and each result is rounded once.

What a row's bits depend on: its own values and the number of tokens in the call, in three classes, 1, 2 to 8 and 9 to 16; within
a class neither on the other rows nor on their number. Calls of more than 16 tokens promise what the library's product does.

Operations whose programs meet take a `workspace`: at least `workspace_size(...)`; None allocates one.
"""

from __future__ import annotations

import itertools

from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.launch import DTYPES, Target, target
from granite_kernels.linear import composed, launches, operations
from granite_kernels.linear.launches import GATE_UP, NEIGHBOURS
from granite_kernels.linear.regimes import is_skinny
from granite_kernels.weight import Weight
from granite_kernels.workspace import Workspace


def _check(x: Tensor, weight: Weight, norm: Tensor | None = None) -> None:
    rows, columns = weight.shape
    if x.dim() == 0 or x.shape[-1] != columns:
        raise GraniteError(f"x has shape {tuple(x.shape)}, the weight [{rows}, {columns}]: x needs {columns} columns")
    if x.dtype not in DTYPES:
        raise GraniteError(f"x is {x.dtype}: expected float32, bfloat16 or float16")
    if norm is not None and (norm.shape != (columns,) or norm.dtype != x.dtype):
        raise GraniteError(f"norm is {norm.dtype} {tuple(norm.shape)}: expected {x.dtype} ({columns},) as x has it")


def _ends(weight: Weight) -> list[int]:
    """The row behind each part."""
    return list(itertools.accumulate(part.shape[0] for part in weight.parts))


def _flat(weight: Weight) -> tuple[list[Tensor], str, list[int]]:
    """The planes, formats and ends of a weight, as the torch operations take them."""
    return [plane for part in weight.parts for plane in part.planes], "|".join(weight.formats), _ends(weight)


def workspace_size(weight: Weight, half: int, tokens: int, where: Target) -> tuple[int, int]:
    """(tickets, partial sums) of a product of 1 to 16 tokens. half: NEIGHBOURS, GATE_UP, or half of head_dim for q|k|v."""
    return launches.workspace_size(_ends(weight), weight.shape[1], half, weight.formats, tokens, where)


def _workspace(workspace: Workspace | None, x: Tensor, weight: Weight, half: int) -> Workspace:
    need = workspace_size(weight, half, x.shape[:-1].numel(), target(x))
    if workspace is None:
        return Workspace.allocate(*need, x.device)
    workspace.need(*need)
    return workspace


def linear(x: Tensor, weight: Weight, *, workspace: Workspace | None = None) -> Tensor:
    """x [..., columns] @ weight.T: [..., rows]. Raises GraniteError."""
    _check(x, weight)
    if not is_skinny(x, weight):
        return composed.linear(x, weight, workspace=workspace)
    work = _workspace(workspace, x, weight, NEIGHBOURS)
    return operations.linear(x.contiguous(), *_flat(weight), work.tickets, work.partials)


def linear_add(x: Tensor, weight: Weight, residual: Tensor, *, scale: float, workspace: Workspace | None = None) -> Tensor:
    """residual + (x @ weight.T) * scale: a branch joins the stream. residual [..., rows]. Raises GraniteError."""
    _check(x, weight)
    if residual.shape != (*x.shape[:-1], weight.shape[0]) or residual.dtype != x.dtype:
        expected = (*x.shape[:-1], weight.shape[0])
        raise GraniteError(f"residual is {residual.dtype} {tuple(residual.shape)}: expected {x.dtype} {expected}")
    if not is_skinny(x, weight):
        return composed.linear_add(x, weight, residual, scale=scale, workspace=workspace)
    work = _workspace(workspace, x, weight, NEIGHBOURS)
    return operations.linear_add(x.contiguous(), *_flat(weight), residual.contiguous(), work.tickets, work.partials, scale)


def norm_gate_up_swiglu(x: Tensor, norm: Tensor, weight: Weight, *, eps: float, workspace: Workspace | None = None) -> Tensor:
    """silu(gate) * up of the normed x: weight [2 * inner, hidden], rows gate | up. Returns [..., inner]. Raises GraniteError."""
    _check(x, weight, norm)
    rows = weight.shape[0]
    if rows % 2:
        raise GraniteError(f"the weight has {rows} rows: an even number is needed, gate | up")
    if not is_skinny(x, weight, GATE_UP):
        return composed.norm_gate_up_swiglu(x, norm, weight, eps=eps, workspace=workspace)
    work = _workspace(workspace, x, weight, GATE_UP)
    return operations.norm_gate_up_swiglu(x.contiguous(), norm, *_flat(weight), work.tickets, work.partials, eps)


def norm_logits(x: Tensor, norm: Tensor, weight: Weight, *, eps: float, scaling: float, workspace: Workspace | None = None) -> Tensor:
    """Logits [..., vocab] of the normed x, divided by `scaling` (Granite's logits_scaling). Raises GraniteError."""
    _check(x, weight, norm)
    if not is_skinny(x, weight):
        return composed.norm_logits(x, norm, weight, eps=eps, scaling=scaling, workspace=workspace)
    work = _workspace(workspace, x, weight, NEIGHBOURS)
    return operations.norm_logits(x.contiguous(), norm, *_flat(weight), work.tickets, work.partials, eps, scaling)


def norm_qkv_rope_append(
    x: Tensor,
    norm: Tensor,
    weight: Weight,
    rotary: Tensor,
    positions: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    eps: float,
    workspace: Workspace | None = None,
) -> Tensor:
    """Norm, the q|k|v product, rotation of q and k, and the write of k and v into the cache. Returns q.

    x [batch, tokens, hidden]; norm [hidden]; weight [(heads + 2 kv_heads) * head_dim, hidden], rows q | k | v; rotary
    [positions, head_dim] (cos | sin); positions int32 [batch, tokens]; lengths int32 [batch], slots in use before this call;
    k_cache, v_cache [batch, kv_heads, context, head_dim], written at slots lengths .. lengths + tokens - 1, rows of head_dim
    contiguous. Returns q [batch, tokens, heads, head_dim]. Raises GraniteError.
    """
    _check(x, weight, norm)
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads, rest = divmod(weight.shape[0] - 2 * kv_heads * head_dim, head_dim)
    if rest or heads < 1 or head_dim % 2:
        raise GraniteError(f"the weight has {weight.shape[0]} rows, which is not q | k | v in heads of {head_dim} with {kv_heads} of k")
    if any(cache.stride()[2:] != (head_dim, 1) or cache.dtype != x.dtype for cache in (k_cache, v_cache)):
        raise GraniteError(f"a cache is needed whose slots are contiguous rows of {head_dim} values of {x.dtype}")
    if not is_skinny(x, weight, head_dim // 2):
        caches = (lengths, k_cache, v_cache)
        return composed.norm_qkv_rope_append(x, norm, weight, rotary, positions, *caches, eps=eps, workspace=workspace)
    work = _workspace(workspace, x, weight, head_dim // 2)
    return operations.norm_qkv_rope_append(
        x.contiguous(),
        norm,
        *_flat(weight),
        rotary,
        positions.contiguous(),
        lengths,
        k_cache,
        v_cache,
        work.tickets,
        work.partials,
        eps,
    )


__all__ = ["GATE_UP", "NEIGHBOURS", "linear", "linear_add", "norm_gate_up_swiglu", "norm_logits", "norm_qkv_rope_append", "workspace_size"]
