"""The tensors that a configuration implies, and the comparison of what a checkpoint has with them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Mapping

from granite_kernels.errors import GraniteError

from ..config import GraniteConfig
from .base import DENSE_FORMATS, TensorInfo

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_SHOWN_EXTRA = 5


@dataclasses.dataclass(frozen=True)
class Expected:
    """A shape and the words that say where it comes from. `vector`: a norm's weight, never packed."""

    shape: tuple[int, ...]
    meaning: str

    @property
    def vector(self) -> bool:
        return len(self.shape) == 1


def expected_tensors(config: GraniteConfig, *, split: bool = False) -> dict[str, Expected]:
    """Canonical name -> shape for every tensor of the model; `split`: gate and up of experts apart, as in GGUF."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "2 * intermediate_size": 2 * config.intermediate_size,
        "shared_intermediate_size": config.shared_intermediate_size,
        "2 * shared_intermediate_size": 2 * config.shared_intermediate_size,
        "num_local_experts": config.num_local_experts,
        "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
        "num_key_value_heads * head_dim": config.num_key_value_heads * config.head_dim,
    }

    def shaped(*dimensions: str) -> Expected:
        return Expected(tuple(sizes[dimension] for dimension in dimensions), ", ".join(dimensions))

    layer = {name: shaped(*dimensions) for name, dimensions in _layer(config, split).items()}
    tensors = {EMBEDDING: shaped("vocab_size", "hidden_size")}
    for index in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{index}.{name}.weight": expected for name, expected in layer.items()}
    tensors["model.norm.weight"] = shaped("hidden_size")
    if not config.tie_word_embeddings:
        tensors[HEAD] = shaped("vocab_size", "hidden_size")
    return tensors


def _layer(config: GraniteConfig, split: bool) -> dict[str, tuple[str, ...]]:
    hidden, inner, shared = "hidden_size", "intermediate_size", "shared_intermediate_size"
    queries, keys = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
    tensors: dict[str, tuple[str, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
    }
    if not config.is_moe:
        return tensors | {
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    experts = "num_local_experts"
    tensors["block_sparse_moe.router.layer"] = (experts, hidden)
    if split:
        tensors |= {f"block_sparse_moe.{half}_exps": (experts, inner, hidden) for half in ("gate", "up")}
    else:
        tensors["block_sparse_moe.input_linear"] = (experts, "2 * " + inner, hidden)
    tensors["block_sparse_moe.output_linear"] = (experts, hidden, inner)
    if config.shared_intermediate_size:
        if split:
            tensors |= {f"shared_mlp.{half}_proj": (shared, hidden) for half in ("gate", "up")}
        else:
            tensors["shared_mlp.input_linear"] = ("2 * " + shared, hidden)
        tensors["shared_mlp.output_linear"] = (hidden, shared)
    return tensors


def check_tensors(
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, Expected],
    *,
    source: str,
    spelled: Mapping[str, str] | None = None,
    packed: Collection[str] = (),
) -> None:
    """Raise GraniteError for missing tensors (all of them at once), wrong shapes and unusable types.

    `spelled`: canonical name -> the source's own, for the errors; `packed`: the block formats that matrices may have.
    """
    names = spelled or {}
    missing = [names.get(name, name) for name in expected if name not in found]
    if missing:
        raise GraniteError(
            f"{source}: {len(missing)} of {len(expected)} expected tensors are missing: {', '.join(missing)}; "
            "download the checkpoint again, or correct the configuration"
        )
    for name, wanted in expected.items():
        info = found[name]
        if info.shape != wanted.shape:
            raise GraniteError(
                f"{info.file}: {info.stored_name} has the shape {list(info.shape)}; expected {list(wanted.shape)}, as the "
                f"configuration implies ({wanted.meaning}), so use configuration and weights of one checkpoint"
            )
        usable = DENSE_FORMATS if wanted.vector else (*DENSE_FORMATS, *packed)
        if info.format not in usable:
            raise GraniteError(
                f"{info.file}: {info.stored_name} has the type {info.format}; expected {', '.join(usable)}, "
                "so get the checkpoint in one of these"
            )


def warn_extra(extra: Iterable[str], source: str) -> None:
    """One warning for tensors that the model has no use for."""
    names = sorted(extra)
    if names:
        shown = ", ".join(names[:_SHOWN_EXTRA]) + (", ..." if len(names) > _SHOWN_EXTRA else "")
        warnings.warn(f"{source}: ignoring {len(names)} tensors that the model has no use for: {shown}", stacklevel=4)
