"""The matrix operations of a decode step, interpreted and traced, with the block sizes that a GPU would get."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from granite_kernels.model.config import GraniteConfig
from torch import Tensor

from granite_kernels.errors import GraniteError
from granite_kernels.kernels import linear as kernels
from granite_kernels.launch import INTERPRETED, MatrixLaunch, matrix_launch, matrix_unroll
from granite_kernels.linear import launches, operations
from granite_kernels.linear.launches import GATE_UP, NEIGHBOURS, blocks_of
from granite_kernels.reference import linear as reference
from granite_kernels.reference.rope import rotary_table
from granite_kernels.testing import assert_accurate
from granite_kernels.weight import Weight
from granite_kernels.workspace import Workspace
from tests.traced import ORDERS, Guarded, cost, run, same_bits

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPERATIONS = ("linear", "linear_add", "norm_logits", "norm_gate_up_swiglu", "norm_qkv_rope_append")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@dataclasses.dataclass
class Call:
    """One operation on given tensors: `on(module)` runs it for the tensors as they are, and gives all that it made and changed."""

    name: str
    tensors: dict[str, Tensor]
    parts: tuple[int, ...]  # rows of each part of the weight
    scalars: dict[str, float]

    def on(self, module: object, dtype: torch.dtype | None = None, workspace: Workspace | None = None) -> list[Tensor]:
        values = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in self.tensors.items()}
        weight = self.weight(values.pop("weight"))
        caches = {name: values[name].clone() for name in values if name.endswith("_cache")}
        extra = {} if workspace is None else {"workspace": workspace}
        out: Tensor = getattr(module, self.name)(weight=weight, **{**values, **caches}, **self.scalars, **extra)
        return [out, *caches.values()]

    def weight(self, matrix: Tensor) -> Weight:
        return Weight.dense(*matrix.split(self.parts))

    def rows(self, count: int) -> Call:
        """The same for the first `count` rows of the batch."""
        batched = {"x", "residual", "positions", "lengths", "k_cache", "v_cache"}
        return dataclasses.replace(self, tensors={n: t[:count] if n in batched else t for n, t in self.tensors.items()})


def make(
    name: str,
    batch: int,
    tokens: int,
    dtype: torch.dtype = BF16,
    *,
    columns: int = 96,
    rows: int = 48,
    heads: tuple[int, int, int] = (HEADS, KV_HEADS, HEAD_DIM),
    parts: tuple[int, ...] = (),
    spread: float = 1.0,
) -> Call:
    """`name` on random tensors. The caches are NaN wherever nothing is stored yet, and hold one token more than they need."""
    query, kv, dim = heads
    rows = (query + 2 * kv) * dim if "qkv" in name else rows
    tensors = {"x": spread * torch.randn(batch, tokens, columns), "weight": torch.randn(rows, columns) * columns**-0.5}
    scalars = {}
    if name.startswith("norm"):
        tensors["norm"] = 1 + torch.randn(columns) / 4
        scalars["eps"] = EPS
    if name == "linear_add":
        tensors["residual"] = torch.randn(batch, tokens, rows)
        scalars["scale"] = 0.22
    if name == "norm_logits":
        scalars["scaling"] = 6.0
    if "qkv" in name:
        lengths = torch.arange(batch, dtype=torch.int32) % 5
        context = 6 + tokens
        for cache in ("k_cache", "v_cache"):
            tensors[cache] = torch.full((batch, kv, context, dim), float("nan"))
            for sequence, length in enumerate(lengths.tolist()):
                tensors[cache][sequence, :, :length] = torch.randn(kv, length, dim)
        tensors["lengths"] = lengths
        tensors["positions"] = (torch.randperm(batch * tokens) + 3).view(batch, tokens).int()
        tensors["rotary"] = rotary_table(batch * tokens + 3, dim, 1e4, dtype=FP32)
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    return Call(name, tensors, parts or (rows,), scalars)


def verify(call: Call, orders: tuple[str, ...] = ORDERS) -> list[Tensor]:
    """The accuracy rule, guarded inputs, the traced orders; unused cache slots keep their bits. Returns the results."""
    guarded = {name: Guarded(tensor) for name, tensor in call.tensors.items()}
    traced = dataclasses.replace(call, tensors={name: guard.tensor for name, guard in guarded.items()})
    actual, _ = run(lambda: traced.on(kernels), orders)
    for name, guard in guarded.items():
        guard.check()
        assert same_bits(guard.tensor, call.tensors[name]), f"{name} was changed"
    for one, exact, eager in zip(actual, call.on(reference, torch.float64), call.on(reference), strict=True):
        empty = exact.isnan()
        assert torch.equal(one.isnan(), empty)
        assert_accurate(one[~empty], exact[~empty], eager[~empty])
    return actual


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("tokens", [*range(1, 18), 33, 129])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_number_of_tokens(name: str, tokens: int) -> None:
    verify(make(name, 1, tokens, columns=32, rows=32, heads=(2, 1, 16)), ORDERS[:1])


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_order_of_programs(name: str, tokens: int) -> None:
    """The order in which programs finish, of which the last one adds up, changes no bit."""
    verify(make(name, 1, tokens, columns=512, rows=48, heads=(1, 1, 16)))


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (5, 1), (4, 4), (3, 11)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_dtype(name: str, batch: int, tokens: int, dtype: torch.dtype) -> None:
    verify(make(name, batch, tokens, dtype, rows=32, heads=(2, 1, 16)), ORDERS[:1])


@pytest.mark.parametrize("columns", [1, 8, 40, 100, 576, 1000])
@pytest.mark.parametrize("name", ["linear_add", "norm_gate_up_swiglu"])
def test_ragged_columns(name: str, columns: int) -> None:
    verify(make(name, 3, 1, columns=columns, rows=32), ORDERS[:1])


@pytest.mark.parametrize("rows", [1, 2, 15, 17, 50, 129])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_ragged_rows(rows: int, tokens: int) -> None:
    verify(make("norm_logits", 1, tokens, rows=rows), ORDERS[:1])
    if rows % 2 == 0:
        verify(make("norm_gate_up_swiglu", 1, tokens, rows=rows), ORDERS[:1])


@pytest.mark.parametrize("heads", [(4, 1, 64), (1, 1, 128), (3, 1, 32), (2, 1, 80)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (2, 4), (16, 1)])
def test_heads(heads: tuple[int, int, int], batch: int, tokens: int) -> None:
    verify(make("norm_qkv_rope_append", batch, tokens, columns=32, heads=heads), ORDERS[:1])


@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_weight_in_parts(name: str, tokens: int) -> None:
    """Separate tensors give the bits of the fused one, wherever they are cut."""
    whole = make(name, 1, tokens)
    rows = whole.tensors["weight"].shape[0]
    fused = whole.on(kernels)
    for parts in ((rows // 2, rows // 2), (rows // 2, rows // 4, rows // 4), (5, rows - 5)):
        split = verify(dataclasses.replace(whole, parts=parts), ORDERS[:1])
        if tokens <= 16:
            assert all(same_bits(a, b) for a, b in zip(split, fused, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", ["norm_logits", "norm_gate_up_swiglu", "norm_qkv_rope_append"])
def test_a_stream_of_large_values(name: str, dtype: torch.dtype) -> None:
    """What residual streams reach in deep layers, times a norm weight of 20, is past float16's range before the root."""
    call = make(name, 3, 1, dtype, spread=2e4)
    call.tensors["x"].clamp_(-6e4, 6e4)
    call.tensors["norm"] = call.tensors["norm"] * 20
    call.tensors["weight"] = call.tensors["weight"] / 20
    verify(call, ORDERS[:1])


# ------------------------------------------------------------------ real sizes: every column, some rows, the real launch shape


def real_shapes() -> list[tuple[str, int, int, int]]:
    """(operation, rows, columns, head_dim) of the dense models' decode launches."""
    shapes = []
    for preset in ("3.1-2b", "3.1-8b"):
        config = GraniteConfig.preset(preset)
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        attended = config.num_attention_heads * dim
        shapes += [
            ("norm_qkv_rope_append", attended + 2 * config.num_key_value_heads * dim, hidden, dim),
            ("linear_add", hidden, attended, dim),
            ("norm_gate_up_swiglu", 2 * inner, hidden, dim),
            ("linear_add", hidden, inner, dim),
            ("norm_logits", config.vocab_size, hidden, dim),
        ]
    return shapes


@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize(("name", "rows", "columns"), [shape[:3] for shape in real_shapes()])
def test_real_sizes(name: str, rows: int, columns: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = matrix_launch(rows, columns, tokens, INTERPRETED)
    monkeypatch.setattr(launches, "matrix_launch", lambda *_: shape)
    verify(make(name, tokens, 1, columns=columns, rows=64 if "gate" in name else 33, heads=(1, 1, 32)), ORDERS[:1])


@pytest.mark.parametrize("tokens", [2, 16])
def test_the_whole_vocabulary(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 49,155 logits begin anywhere; column 0 of the later ones has been wrong in other projects.

    Few programs with more rows than a GPU would give them: the index of a row is what counts here.
    """
    monkeypatch.setattr(launches, "matrix_launch", lambda *_: MatrixLaunch(256, 1, 1, 8 if tokens <= 8 else 16))
    verify(make("norm_logits", tokens, 1, columns=32, rows=49155), ORDERS[:1])


# ------------------------------------------------------------------ promises


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_do_not_influence_one_another(name: str) -> None:
    for most, fewer in ((8, (2, 5)), (16, (9, 13))):
        whole = make(name, most, 1, columns=512)
        many = whole.on(kernels)
        for count in fewer:
            few = whole.rows(count).on(kernels)
            assert all(same_bits(a[:count], b) for a, b in zip(many, few, strict=True))
        whole.tensors["x"][1] = float("nan")
        spoilt = whole.on(kernels)
        assert same_bits(spoilt[0][2:], many[0][2:])
        assert spoilt[0][1].isnan().all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_tickets_are_left_as_they_were(name: str) -> None:
    call = make(name, 3, 1, columns=512)
    assert matrix_launch(48, 512, 3, INTERPRETED).splits > 1
    workspace = Workspace.allocate(64, 1 << 16, "cpu")
    workspace.partials.fill_(float("nan"))
    first = call.on(kernels, workspace=workspace)
    assert not workspace.tickets.any()
    assert all(same_bits(a, b) for a, b in zip(first, call.on(kernels, workspace=workspace), strict=True))
    with pytest.raises(ValueError, match="the workspace holds"):
        call.on(kernels, workspace=Workspace.allocate(1, 1, "cpu"))


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_weight_is_read_by_one_program(name: str, tokens: int) -> None:
    call = make(name, tokens, 1, columns=512, rows=128, heads=(2, 1, 32))
    _, (launch,) = run(lambda: call.on(kernels), ORDERS[:1])
    assert launch["planes.0"].programs_per_sector == 1
    assert launch["planes.0"].read_bytes == launch["planes.0"].bytes
    assert launch.streamed_bytes == launch["planes.0"].bytes


@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
@pytest.mark.parametrize("preset", ["3.1-2b", "3.1-8b"])
def test_what_a_step_moves_beside_the_weights(preset: str, tokens: int) -> None:
    """Of the weights' bytes: x at most 0.3 into the multiprocessors, partial sums at most 0.02 out of them."""
    weights = activations = partials = 0
    shapes = [shape for shape in real_shapes() if shape[3] == GraniteConfig.preset(preset).head_dim]
    layers = GraniteConfig.preset(preset).num_hidden_layers
    for name, rows, columns, dim in shapes:
        half = {"norm_qkv_rope_append": dim // 2, "norm_gate_up_swiglu": GATE_UP}.get(name, NEIGHBOURS)
        times = 1 if name == "norm_logits" else layers
        shape = matrix_launch(rows, columns, tokens, INTERPRETED)
        blocks = blocks_of((rows,), half, ("dense",), shape)
        weights += times * 2 * rows * columns
        activations += times * blocks * 2 * columns * (tokens + name.startswith("norm"))
        partials += times * 4 * shape.workspace(blocks)[1]
    assert activations <= 0.3 * weights
    assert partials <= 0.02 * weights


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_cost_is_the_traffic(name: str) -> None:
    call = make(name, 2, 1, columns=128, rows=64)
    _, (launch,) = run(lambda: call.on(kernels), ORDERS[:1])
    matrix = call.tensors["weight"]
    args = {"x_ptr": call.tensors["x"], "planes": (matrix,), "tokens": 2, "rows": matrix.shape[0], "NORM": int(name.startswith("norm"))}
    args.update(SHAPE=SimpleNamespace(columns=matrix.shape[1]), **({"residual_ptr": None} if name == "linear_add" else {}))
    counted = cost(operations, launch, args)["bytes"]
    scratch = launch["partials_ptr"].read_bytes + launch["partials_ptr"].written_bytes if "partials_ptr" in launch.arguments else 0
    assert counted == pytest.approx(launch.read_bytes + launch.written_bytes - scratch, rel=0.05)


# ------------------------------------------------------------------ torch, and what is refused


def flat(call: Call) -> tuple[Callable[..., Tensor], tuple[object, ...]]:
    """The torch operation beneath a call and its arguments."""
    t = call.tensors
    ends = list(itertools.accumulate(call.parts))
    planes = ([part.clone() for part in t["weight"].split(call.parts)], "|".join(["dense"] * len(ends)), ends)
    scratch = (torch.zeros(64, dtype=torch.int32), torch.zeros(1 << 14))
    arguments: dict[str, tuple[object, ...]] = {
        "linear": (t["x"], *planes, *scratch),
        "linear_add": (t["x"], *planes, t.get("residual"), *scratch, 0.22),
        "norm_logits": (t["x"], t.get("norm"), *planes, *scratch, EPS, 6.0),
        "norm_gate_up_swiglu": (t["x"], t.get("norm"), *planes, *scratch, EPS),
    }
    if "qkv" in call.name:
        more = (t[n] for n in ("rotary", "positions", "lengths", "k_cache", "v_cache"))
        arguments[call.name] = (t["x"], t["norm"], *planes, *more, *scratch, EPS)
    return getattr(torch.ops.granite_kernels, call.name).default, arguments[call.name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_sees_through_them(name: str) -> None:
    call = make(name, 2, 1)
    for cache in ("k_cache", "v_cache"):
        if cache in call.tensors:
            call.tensors[cache].nan_to_num_(0.0)  # opcheck compares what was changed, and NaN with nothing
    torch.library.opcheck(*flat(call))


def test_compiled_without_a_break() -> None:
    call = make("linear_add", 2, 1)
    weight = Weight.dense(call.tensors["weight"])
    x, residual = call.tensors["x"], call.tensors["residual"]

    def branch(x: Tensor, residual: Tensor) -> Tensor:
        return kernels.linear_add(x, weight, residual, scale=0.22)

    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x, residual), branch(x, residual))


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(2, 1, 32), Weight.dense(torch.randn(48, 32))
    norm = torch.ones(32)
    with pytest.raises(GraniteError, match=r"x has shape \(2, 1, 31\), the weight \[48, 32\]: x needs 32 columns"):
        kernels.linear(x[..., 1:], weight)
    with pytest.raises(GraniteError, match=r"x is torch\.float64"):
        kernels.linear(x.double(), weight)
    with pytest.raises(GraniteError, match=r"norm is torch.float32 \(31,\): expected torch.float32 \(32,\)"):
        kernels.norm_logits(x, norm[1:], weight, eps=EPS, scaling=1.0)
    with pytest.raises(GraniteError, match="residual is"):
        kernels.linear_add(x, weight, x, scale=1.0)
    with pytest.raises(GraniteError, match="47 rows: an even number is needed"):
        kernels.norm_gate_up_swiglu(x, norm, Weight.dense(torch.randn(47, 32)), eps=EPS)
    call = make("norm_qkv_rope_append", 2, 1)
    call.tensors["k_cache"] = call.tensors["k_cache"].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(GraniteError, match="slots are contiguous rows of 16 values"):
        kernels.norm_qkv_rope_append(
            **{k: v for k, v in call.tensors.items() if k != "weight"}, weight=Weight.dense(call.tensors["weight"]), eps=EPS
        )


def test_anything_beside_dense_decoding_is_composed() -> None:
    """No rows at all, columns of an odd layout, more parts than a launch reads: the library's product serves them."""
    x, matrix = torch.randn(2, 1, 32).to(BF16), torch.randn(48, 32).to(BF16)
    expected = reference.linear(x, Weight.dense(matrix))
    assert kernels.linear(x[:0], Weight.dense(matrix)).shape == (0, 1, 48)
    for weight in (Weight.dense(matrix.T.contiguous().T), Weight.dense(*matrix.split(12)), Weight.dense(matrix.float())):
        assert_accurate(kernels.linear(x, weight), reference.linear(x.double(), Weight.dense(matrix.double())), expected)


def test_launch_shapes_fit_their_sizes() -> None:
    for columns in (1, 32, 96, 512, 576, 1000, 1536, 2048, 4096, 8192, 12800):
        for rows in (16, 2048, 49155):
            for tokens in (1, 8, 16):
                shape = matrix_launch(rows, columns, tokens, INTERPRETED)
                assert isinstance(shape, MatrixLaunch)
                assert shape.blocks(rows, 8) * 16 * shape.groups >= rows
                if columns % 256 == 0:  # nothing is masked
                    shares = shape.warps * shape.splits
                    assert columns % (32 * shares * matrix_unroll(columns, shares, "dense")) == 0
