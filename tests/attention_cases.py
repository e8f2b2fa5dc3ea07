"""Inputs for the tests of attention, and launches of it to compile. Slots that no query may see hold NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from granite_kernels.bench.offline.traffic import trace
from torch import Tensor

from granite_kernels import testing
from granite_kernels.reference.attention import attention as reference

SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    starts: Tensor
    scale: float = SCALE

    def run(self, op: Callable[..., Tensor]) -> Tensor:
        return op(self.q, self.k_cache, self.v_cache, self.lengths, self.starts, scale=self.scale)

    def row(self, index: int) -> Inputs:
        """That row of the batch, alone."""
        q, k, v, lengths, starts = (x[index : index + 1].clone() for x in (self.q, self.k_cache, self.v_cache, self.lengths, self.starts))
        return Inputs(q, k, v, lengths, starts, self.scale)

    def without_padding(self) -> Inputs:
        """The same rows moved to the front of their cache. Only for rows that hold no query before their start."""
        k, v = (
            torch.stack([x.roll(-start, 1) for x, start in zip(cache, self.starts.tolist(), strict=True)])
            for cache in (self.k_cache, self.v_cache)
        )
        return Inputs(self.q, k, v, self.lengths - self.starts, torch.zeros_like(self.starts), self.scale)


def inputs(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    tokens: int,
    lengths: Sequence[int],
    starts: Sequence[int] | None = None,
    *,
    kv_heads: int = 1,
    context: int = 768,
    size: float = 1.0,
    scale: float = SCALE,
) -> Inputs:
    """`tokens` queries a row behind `lengths` slots of cache, of which those before `starts` are padding. q and k are of `size`."""
    generator = torch.Generator().manual_seed(head_dim + group + tokens)
    starts = starts or [0] * len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = (size * normal(len(lengths), tokens, kv_heads * group, head_dim)).to(dtype)
    k, v = (torch.full((len(lengths), kv_heads, context, head_dim), float("nan"), dtype=dtype) for _ in range(2))
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        used = max(length + tokens - start, 0)
        k[row, :, start : start + used] = (size * normal(kv_heads, used, head_dim)).to(dtype)
        v[row, :, start : start + used] = normal(kv_heads, used, head_dim).to(dtype)
    return Inputs(q, k, v, torch.tensor(lengths, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32), scale)


def assert_right(op: Callable[..., Tensor], case: Inputs) -> Tensor:
    """The op obeys the accuracy rule, and its trace shows no race and no stray access."""
    with trace(race=True) as traced:
        actual = case.run(op)
    assert not traced.problems
    k, v = case.k_cache.nan_to_num(), case.v_cache.nan_to_num()  # plain PyTorch turns a masked NaN into NaN
    exact = reference(case.q.double(), k.double(), v.double(), case.lengths, case.starts, scale=case.scale)
    testing.assert_accurate(actual, exact, reference(case.q, k, v, case.lengths, case.starts, scale=case.scale))
    return actual


def assert_order_is_free(op: Callable[..., Tensor], case: Inputs) -> None:
    """The order in which programs run shows in no bit."""
    results = []
    for order in ("forward", "reverse", "random"):
        with trace(race=True, order=order) as traced:
            results.append(case.run(op))
        assert not traced.problems
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def exact(case: Inputs) -> Tensor:
    """The result in float64, rounded to float32: for one row without unused slots."""
    arguments = case.q.double(), case.k_cache.double(), case.v_cache.double(), case.lengths, case.starts
    return reference(*arguments, scale=case.scale).float()


def longest(tokens: int) -> Inputs:
    """`tokens` queries at the end of 131,072 slots in float32, the last of which must show in the result."""
    case = inputs(torch.float32, 64, 4, tokens, [131072 - tokens], context=131072)
    case.v_cache[:, :, -1] *= 1000
    return case


def far_rows(head_dim: int, tokens: int) -> Inputs:
    """Two rows whose caches lie 2^31 elements apart, in memory of which only these are ever touched."""
    near = inputs(torch.bfloat16, head_dim, 2, tokens, [5, 9], context=32)
    far = 1 << 31
    storage = torch.empty(far + 2 * 32 * head_dim, dtype=torch.bfloat16)
    strides = (far, 32 * head_dim, head_dim, 1)
    k, v = (
        storage.as_strided(near.k_cache.shape, strides, offset).copy_(cache)
        for offset, cache in ((0, near.k_cache), (32 * head_dim, near.v_cache))
    )
    return Inputs(near.q, k, v, near.lengths, near.starts)


def _empty(head_dim: int, tokens: int, context: int, batch: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    q = torch.empty(batch, tokens, 32, head_dim, dtype=dtype)
    k, v = (torch.empty(batch, 8, context, head_dim, dtype=dtype) for _ in range(2))
    lengths, starts = (torch.empty(batch, dtype=torch.int32) for _ in range(2))
    return Inputs(q, k, v, lengths, starts)


def launch_prefill() -> None:
    """As Granite 2B (head size 64) and 8B (128) prefill, each twice: the second request is of other sizes."""
    from granite_kernels.kernels.attention import attention

    for head_dim in (64, 128):
        for tokens, context, batch in ((2048, 4096, 1), (777, 1024, 3)):
            _empty(head_dim, tokens, context, batch).run(attention)


def launch_decode() -> None:
    """As Granite 2B and 8B decode, each twice, the second request of other sizes; then 16 tokens and 9."""
    from granite_kernels.kernels.attention_decode import attention_decode

    for head_dim in (64, 128):
        for tokens, context, batch in ((1, 16384, 1), (1, 1280, 13), (16, 1024, 1), (9, 512, 1)):
            _empty(head_dim, tokens, context, batch).run(attention_decode)


def launch_float32(head_dim: int = 128) -> None:
    """Prefill, and decode of one token and of 16, in float32."""
    from granite_kernels.kernels.attention import attention
    from granite_kernels.kernels.attention_decode import attention_decode

    _empty(head_dim, 512, 512, 1, torch.float32).run(attention)
    for tokens in (1, 16):
        _empty(head_dim, tokens, 512, 1, torch.float32).run(attention_decode)


def launch_small_float32() -> None:
    launch_float32(64)
