"""Who generates: ours and transformers behind one small interface, on the same weights.

    engine.run(ids [batch, tokens], new) -> moments (seconds) at which each of `new` steps' tokens had reached the caller

transformers gets our weights as views under its own names, so that both compute the same model and a file that it can't read, as a
Granite GGUF, is no obstacle. Packed weights are given to it as their values.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.dropin import accelerate, fast_decode
from granite_kernels.model.granite import Layer
from granite_kernels.model.model import GraniteForCausalLM
from torch import Tensor

from granite_kernels.weight import DENSE, Weight, dense_matrix

STATIC = "transformers, static cache and torch.compile"
TRANSFORMERS = "transformers eager"
ACCELERATED = "transformers, accelerated"  # granite_kernels.accelerate under their own generate
FAST_DECODE = "transformers, fast_decode"  # their generate around our decode loop


class Engine(Protocol):
    """What generates, greedily and without stopping early."""

    weight_bytes: int
    compiles: bool  # the first request of a shape takes longer

    def run(self, ids: Tensor, new: int) -> list[float]: ...

    def logits(self, ids: Tensor) -> Tensor: ...


class Ours:
    """Our model as `generate` runs it."""

    def __init__(self, model: GraniteForCausalLM) -> None:
        self.model = model
        self.weight_bytes = model.memory().weights
        self.compiles = model.device.type == "cuda"

    def run(self, ids: Tensor, new: int) -> list[float]:
        moments = []
        with contextlib.closing(self.model._run(self.model._request(ids, max_new_tokens=new, eos_token_id=[]))) as steps:
            for _ in steps:
                moments.append(time.perf_counter())
        return moments

    def logits(self, ids: Tensor) -> Tensor:
        """Of every position: a prompt, then one token at a time, so that prefill and decoding are both seen."""
        half = ids.shape[1] // 2
        out = self.model(ids[:, :half])
        found = [out.logits]
        for position in range(half, ids.shape[1]):
            out = self.model(ids[:, position : position + 1], past_key_values=out.past_key_values)
            found.append(out.logits)
        return torch.cat(found, dim=1)

    def plain(self) -> Ours:
        """The same weights on plain PyTorch: what every engine is verified against."""
        return Ours(GraniteForCausalLM(self.model.config, self.model.weights, backend="torch"))


class Moments:
    """A transformers streamer that notes when tokens come; its first call brings the prompt."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if not self.prompt:
            self.at.append(time.perf_counter())
        self.prompt = False

    def end(self) -> None:
        pass


class Transformers:
    """transformers' `generate`: eager with its dynamic cache, compiled over a static one, or with ours in it."""

    def __init__(self, theirs: Any, implementation: str) -> None:
        self.theirs, self.implementation = theirs, implementation
        self.compiles = implementation == STATIC or theirs.device.type == "cuda"
        self.weight_bytes = sum(p.numel() * p.element_size() for p in theirs.parameters())
        self.arguments: dict[str, Any] = {"do_sample": False}
        theirs.generation_config.eos_token_id = None
        theirs.generation_config.pad_token_id = 0
        if implementation == ACCELERATED:
            accelerate(theirs)
        elif implementation == FAST_DECODE:
            self.arguments["custom_generate"] = fast_decode
        elif implementation == STATIC:
            from transformers import CompileConfig

            compiling = CompileConfig()
            compiling._compile_all_devices = True  # on a CPU, too
            self.arguments |= {"cache_implementation": "static", "compile_config": compiling}

    @torch.no_grad()
    def run(self, ids: Tensor, new: int) -> list[float]:
        moments = Moments()
        self.theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, streamer=moments, **self.arguments)
        return moments.at

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        model = self.theirs
        if self.implementation == FAST_DECODE:
            from granite_kernels.model.hf.decode import engine_of

            model = engine_of(model)  # what its tokens come from
        found: Tensor = model(ids).logits
        return found


def transformers_from(model: GraniteForCausalLM, implementation: str = TRANSFORMERS) -> Transformers:
    """transformers' model of the same weights: views where ours are dense rows, copies elsewhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = model.config.to_dict()
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    theirs.load_state_dict(unfused(model), assign=True, strict=False)
    if model.config.tie_word_embeddings:
        theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(model.device)  # its buffers are in no state_dict
    missing = [name for name, parameter in theirs.named_parameters() if parameter.is_meta]
    if missing:
        raise RuntimeError(f"transformers' model has parameters that ours doesn't: {', '.join(missing[:4])}")
    return Transformers(theirs.eval(), implementation)


def unfused(model: GraniteForCausalLM) -> dict[str, Tensor]:
    """Our weights under transformers' names: q, k, v and gate, up apart, experts stacked."""
    config, weights = model.config, model.weights
    state = {"model.embed_tokens.weight": rows(weights.embed, model.dtype), "model.norm.weight": weights.norm.detach()}
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = rows(weights.head, model.dtype)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        state |= {prefix + name: tensor for name, tensor in _layer(config, layer, lambda w: rows(w, model.dtype))}
    return state


def rows(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as one dense matrix, rows contiguous."""
    found = [dense_matrix(part, dtype).detach() for part in weight.parts]
    return (found[0] if len(found) == 1 else torch.cat(found)).contiguous()


def _layer(config: GraniteConfig, layer: Layer, dense: Callable[[Weight], Tensor]) -> Iterator[tuple[str, Tensor]]:
    head_dim, hidden = config.head_dim, config.hidden_size
    widths = (config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim, config.num_key_value_heads * head_dim)
    yield "input_layernorm.weight", layer.input_norm.detach()
    yield "post_attention_layernorm.weight", layer.post_norm.detach()
    yield from zip((f"self_attn.{name}_proj.weight" for name in "qkv"), dense(layer.qkv).split(widths), strict=True)
    yield "self_attn.o_proj.weight", dense(layer.o)
    if layer.experts is None:
        assert layer.gate_up is not None and layer.down is not None
        yield from zip(("mlp.gate_proj.weight", "mlp.up_proj.weight"), dense(layer.gate_up).chunk(2), strict=True)
        yield "mlp.down_proj.weight", dense(layer.down)
        return
    count, experts = config.num_local_experts, layer.experts
    yield "block_sparse_moe.router.weight", experts.router.detach()
    yield "block_sparse_moe.experts.gate_up_proj", dense(experts.gate_up).view(count, -1, hidden)
    yield "block_sparse_moe.experts.down_proj", dense(experts.down).view(count, hidden, -1)
    if experts.shared_gate_up is not None and experts.shared_down is not None:
        yield "shared_mlp.input_linear.weight", dense(experts.shared_gate_up)
        yield "shared_mlp.output_linear.weight", dense(experts.shared_down)


def stored_format(model: GraniteForCausalLM) -> str:
    """What most bytes of the model are stored as: "bfloat16", "q6_k", ..."""
    from granite_kernels.weight import Part

    sizes: dict[str, int] = {}
    for module in model.weights.modules():
        if isinstance(module, Part):
            name = str(model.dtype).removeprefix("torch.") if module.format == DENSE else module.format
            sizes[name] = sizes.get(name, 0) + module.nbytes
    return max(sizes, key=lambda name: sizes[name])
