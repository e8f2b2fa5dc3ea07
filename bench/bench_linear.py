"""The matrices of a layer and the head, with what is fused to them: at few tokens a stream of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from granite_kernels.bench.harness import Case, Inputs
from granite_kernels.bench.place import empty_slots, places, written
from granite_kernels.bench.rivals import laid_out, product
from granite_kernels.bench.shapes import Setting, product_cost

from granite_kernels.reference import linear as reference
from granite_kernels.weight import Weight


def _case(setting: Setting, op: str, role: str, args: tuple[Any, ...], place: int, written: int, read: int, **rest: Any) -> Case:
    """`place`: of the weight among the arguments; `written` values a token; `read` values beside x and the weight."""
    weight: Weight = args[place]
    keywords = rest.pop("keywords", {})
    return Case(
        op=op,
        file="linear",
        size=f"{role} {weight.shape[1]} -> {weight.shape[0]}",
        setting=setting,
        inputs=Inputs(args, keywords),
        cost=product_cost(setting, weight, written, read),
        rivals=(*laid_out(setting, getattr(reference, op), place), product(setting, weight=place)),
        role=role if setting.decoding else "",
        times=(1 if role == "logits" else setting.config.num_hidden_layers) if setting.decoding else 0,
        packs=True,
        **rest,
    )


def cases(setting: Setting) -> Iterator[Case]:
    config, tokens = setting.config, setting.tokens
    hidden, inner, head_dim, kv_heads = config.hidden_size, config.intermediate_size, config.head_dim, config.num_key_value_heads
    attended = config.num_attention_heads * head_dim
    projected = attended + 2 * kv_heads * head_dim
    x, norm, scale = setting.normal(*setting.shape, hidden), 1 + setting.normal(hidden, scale=0.1, seed=1), config.residual_multiplier
    eps = {"eps": config.rms_norm_eps}
    residual = setting.normal(*setting.shape, hidden, seed=3)
    qkv = (x, norm, setting.weight(projected, hidden), *places(setting))
    stored = dict(results=written(setting), reset=empty_slots(setting))
    yield _case(setting, "norm_qkv_rope_append", "qkv", qkv, 2, projected, hidden, keywords=eps, **stored)
    del qkv  # one matrix at a time

    def added(role: str, columns: int) -> Case:
        arguments = (setting.normal(*setting.shape, columns, seed=4), setting.weight(hidden, columns), residual)
        return _case(setting, "linear_add", role, arguments, 1, hidden, tokens * hidden, keywords={"scale": scale})

    yield added("o", attended)
    if not config.is_moe:
        gate_up = (x, norm, setting.weight(2 * inner, hidden))
        yield _case(setting, "norm_gate_up_swiglu", "gate_up", gate_up, 2, inner, hidden, keywords=eps)
        del gate_up
        yield added("down", inner)
    if setting.decoding:
        head = (x, norm, setting.weight(config.vocab_size, hidden))
        keywords = {**eps, "scaling": config.logits_scaling}
        yield _case(setting, "norm_logits", "logits", head, 2, config.vocab_size, hidden, keywords=keywords)


def test_linear(measured: Callable[[], None]) -> None:
    measured()
