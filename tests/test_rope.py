"""rope_append against float64: the rotation, and what lands in which slot of the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.kernels import rope as kernels
from granite_kernels.kernels.rope import rope_append
from granite_kernels.reference import rope as reference
from granite_kernels.testing import assert_accurate
from tests.traced import Guarded, cost, run, same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CONTEXT = 48


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@dataclasses.dataclass
class Case:
    """q, k and v as views of one product, and two layers of a cache full of NaN, of which the second is to be written."""

    qkv: Tensor
    heads: int
    rotary: Tensor
    positions: Tensor
    lengths: Tensor
    caches: Tensor  # [k | v, layers, batch, kv_heads, context, head_dim]

    @classmethod
    def make(cls, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Case:
        return cls(
            torch.randn(batch, tokens, heads + 2 * kv_heads, head_dim).to(dtype),
            heads,
            reference.rotary_table(1024, head_dim, 10000.0, dtype=dtype),
            torch.randint(0, 1024, (batch, tokens), dtype=torch.int32),  # unlike the slots, and each its own
            torch.randint(0, CONTEXT - tokens + 1, (batch,), dtype=torch.int32),
            torch.full((2, 2, batch, kv_heads, CONTEXT, head_dim), float("nan"), dtype=dtype),
        )

    def call(self, op: Callable[..., Tensor] = rope_append, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The rotated q, and the caches afterwards."""
        dtype = dtype or self.qkv.dtype
        caches = self.caches.to(dtype, copy=True)
        kv_heads = self.caches.shape[3]
        q, k, v = self.qkv.to(dtype).split((self.heads, kv_heads, kv_heads), dim=2)
        return op(q, k, v, self.rotary.to(dtype), self.positions, self.lengths, caches[0, 1], caches[1, 1]), caches


SIZES = [(32, 8, 64), (16, 8, 64), (24, 8, 64), (32, 8, 128), (3, 1, 80), (2, 2, 6), (1, 1, 2)]
CASES = [(2, 2, *sizes, BF16) for sizes in SIZES]
CASES += [(1, 17, 4, 2, 64, BF16), (16, 1, 4, 1, 64, BF16), (1, 33, 2, 1, 16, BF16)]
CASES += [(2, 3, *sizes, dtype) for sizes in [(4, 2, 64), (3, 1, 80)] for dtype in (FP16, FP32)]


@pytest.mark.parametrize(("batch", "tokens", "heads", "kv_heads", "head_dim", "dtype"), CASES)
def test_rope_append(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    case = Case.make(batch, tokens, heads, kv_heads, head_dim, dtype)
    guarded = Guarded(case.qkv), Guarded(case.rotary)
    case.qkv, case.rotary = (g.tensor for g in guarded)
    (q, caches), _ = run(case.call)
    exact, exact_caches = case.call(reference.rope_append, torch.float64)
    eager, eager_caches = case.call(reference.rope_append)
    assert_accurate(q, exact, eager)
    written = ~exact_caches.isnan()
    assert written.sum() == 2 * batch * kv_heads * tokens * head_dim
    assert torch.equal(~caches.isnan(), written), "a slot that isn't the call's own was written, or one of its own was not"
    assert_accurate(caches[written], exact_caches[written], eager_caches[written])
    assert torch.equal(caches[1].nan_to_num(), eager_caches[1].nan_to_num()), "v is copied"
    for tensor in guarded:
        tensor.check()


def test_a_sequence_does_not_depend_on_the_others() -> None:
    case = Case.make(5, 3, 4, 2, 64, BF16)
    q, caches = case.call()
    for batch in (1, 3):
        own = dict(qkv=case.qkv[:batch], positions=case.positions[:batch], lengths=case.lengths[:batch], caches=case.caches[:, :, :batch])
        fewer_q, fewer_caches = dataclasses.replace(case, **own).call()
        assert same_bits(fewer_q, q[:batch])
        assert same_bits(fewer_caches, caches[:, :, :batch])


def test_far_positions_keep_their_accuracy() -> None:
    case = Case.make(1, 4, 2, 1, 64, FP32)
    case.rotary = reference.rotary_table(131072, 64, 10_000_000.0, dtype=FP32)
    case.positions = torch.tensor([[131071, 131070, 70000, 0]], dtype=torch.int32)
    q, _ = case.call()
    assert_accurate(q, case.call(reference.rope_append, torch.float64)[0], case.call(reference.rope_append)[0])
    assert same_bits(q[:, 3], case.qkv[:, 3, :2])  # position 0 turns nothing


@pytest.mark.parametrize("layout", ["heads first", "padded", "one token of many"])
def test_strides(layout: str) -> None:
    batch, tokens, heads, head_dim = 2, 1 if layout == "one token of many" else 3, 4, 32
    case = Case.make(batch, tokens, heads, 1, head_dim, FP32)
    q, k, v = case.qkv.split((heads, 1, 1), dim=2)
    if layout == "padded":
        spread = torch.randn(batch, 8, heads, head_dim + 1)[:, 2 : 2 + tokens, :, :head_dim]
        spread.copy_(q)
    else:
        spread = q.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one token of many":  # the stride of a dimension of size 1 says nothing
        assert spread.is_contiguous()
        assert spread.stride(1) != heads * head_dim
    expected, _ = case.call()
    caches = case.caches.clone()
    out = rope_append(spread, k, v, case.rotary, case.positions, case.lengths, caches[0, 1], caches[1, 1])
    assert same_bits(out, expected)


def test_the_cost_is_the_traffic() -> None:
    case = Case.make(2, 3, 4, 2, 64, BF16)
    _, (launch,) = run(case.call, ("forward",))
    rest = sum(launch[f"{name}_ptr"].read_bytes for name in ("rotary", "positions", "lengths"))
    args = {"q_ptr": case.qkv, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64}
    assert cost(kernels, launch, args)["bytes"] == launch.read_bytes + launch.written_bytes - rest


def test_torch_sees_through_it() -> None:
    case = Case.make(2, 3, 4, 2, 16, FP32)
    q, k, v = case.qkv.split((4, 2, 2), dim=2)
    k_cache, v_cache = torch.zeros(2, 2, 2, CONTEXT, 16).unbind()
    arguments = (q, k, v, case.rotary, case.positions, case.lengths, k_cache, v_cache)
    torch.library.opcheck(torch.ops.granite_kernels.rope_append.default, arguments)


def test_what_does_not_fit_is_refused() -> None:
    case = Case.make(2, 3, 4, 2, 16, FP32)
    q, k, v = case.qkv.split((4, 2, 2), dim=2)
    k_cache, v_cache = case.caches[:, 0].unbind()
    good = dict(q=q, k=k, v=v, rotary=case.rotary, positions=case.positions, lengths=case.lengths, k_cache=k_cache, v_cache=v_cache)
    for changes, message in [
        (dict(k=k[:, :2]), "don't go together"),
        (dict(v=v[:, :, :1]), "don't go together"),
        (dict(k_cache=k_cache[:1], v_cache=v_cache[:1]), "doesn't go into caches"),
        (dict(k_cache=k_cache.transpose(1, 2).contiguous().transpose(1, 2)), "same strides"),
        (dict(rotary=case.rotary[:, :8]), r"expected \[.., 16\], \[2, 3\] and \[2\]"),
        (dict(positions=case.positions[:, :2]), r"expected \[.., 16\], \[2, 3\] and \[2\]"),
        (dict(rotary=case.rotary.double()), "float32, bfloat16, float16 for q, k, v, rotary"),
        (dict(positions=case.positions.T.contiguous().T), "must be contiguous"),
    ]:
        with pytest.raises(GraniteError, match=message):
            rope_append(**{**good, **changes})
