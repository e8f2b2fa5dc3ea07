"""rope_append: the rotation, and what lands in which slot of the cache."""

from __future__ import annotations

import pytest
import torch

from granite_kernels.kernels.rope import rope_append
from granite_kernels.reference import rope as reference
from granite_kernels.testing import assert_accurate
from tests.traced import run as in_all_orders

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)



@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "batch", "tokens"), [(64, 8, 2, 2, 3), (128, 4, 2, 1, 5), (64, 9, 3, 3, 1), (48, 3, 1, 2, 2)]
)
def test_rope_append(head_dim: int, heads: int, kv_heads: int, batch: int, tokens: int, dtype: torch.dtype) -> None:
    qkv = randn(batch, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    parts = qkv.split((heads, kv_heads, kv_heads), dim=2)  # views of the fused product, as the model has them
    lengths = torch.arange(batch, dtype=torch.int32) * 5 + 1
    positions = (torch.arange(batch)[:, None] * 37 + torch.arange(tokens) * 3 + 11).int()  # differ from the slots, and between rows
    table = reference.rotary_table(256, head_dim, 10000.0, dtype=torch.float64)
    shape = (batch, kv_heads, 256, head_dim)

    def run(op: object, wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        caches = torch.full(shape, float("nan"), dtype=wide), torch.full(shape, float("nan"), dtype=wide)
        out = op(*(part.to(wide) if wide != dtype else part for part in parts), table.to(wide), positions, lengths, *caches)  # type: ignore[operator]
        return out, *caches

    (q, k, v), _ = in_all_orders(lambda: run(rope_append, dtype))
    exact, eager = run(reference.rope_append, torch.float64), run(reference.rope_append, dtype)
    assert_accurate(q, exact[0], eager[0])
    written = ~eager[1].isnan()
    assert torch.equal(k.isnan(), eager[1].isnan())
    assert torch.equal(v.isnan(), eager[2].isnan())
    assert_accurate(k[written], exact[1][written], eager[1][written])
    assert torch.equal(v[written], eager[2][written])


def test_positions_to_131071() -> None:
    table = reference.rotary_table(131072, 64, 5e6, dtype=torch.float32)
    q, k = randn(1, 2, 4, 64, dtype=torch.float32), randn(1, 2, 1, 64, dtype=torch.float32, seed=1)
    positions = torch.tensor([[131070, 131071]], dtype=torch.int32)
    caches = [torch.zeros(1, 1, 256, 64) for _ in range(4)]
    lengths = torch.zeros(1, dtype=torch.int32)
    out = rope_append(q, k, k, table, positions, lengths, caches[0], caches[1])
    expected = reference.rope_append(q, k, k, table, positions, lengths, caches[2], caches[3])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(caches[0], caches[2], rtol=1e-6, atol=1e-6)


def test_torch_sees_through_the_operation() -> None:
    q, k = randn(1, 2, 4, 16, dtype=torch.float32), randn(1, 2, 2, 16, dtype=torch.float32, seed=1)
    table = reference.rotary_table(32, 16, 1e4, dtype=torch.float32)
    positions, lengths = torch.tensor([[3, 4]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    caches = torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 32, 16)
    torch.library.opcheck(torch.ops.granite_kernels.rope_append.default, (q, k, k, table, positions, lengths, *caches))
