"""Our engine in the place of a transformers model: `generate` with all its modes, pipeline, lm-eval's HFLM.

A view without a copy: it holds the engine and turns its forward into the one that transformers' GenerationMixin calls. It isn't
a PreTrainedModel, whose `save_pretrained` would write an architecture that the engine's tensors don't have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Cache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from granite_kernels.errors import GraniteError

from ..cache import Cache as EngineCache
from ..model import GraniteForCausalLM as Engine
from .models import CACHE

OWN_CACHE = (None, "dynamic", "static")  # all mean the engine's: allocated once for a request, grown in place


class ViewCache(Cache):  # type: ignore[misc]  # transformers is untyped to mypy
    """The engine's cache behind the methods that transformers' loops call; empty until the first forward."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.engine: EngineCache | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.engine.length if self.engine is not None else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove slots, as transformers counts them; 0 forgets none."""
        if tokens_to_remove > 0:
            raise GraniteError(f"crop takes the number of slots to forget as a negative number, not {tokens_to_remove}")
        if self.engine is not None:
            self.engine.crop(self.engine.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.engine is not None:
            self.engine.select(indices.to(self.engine.k.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.engine is not None:
            rows = torch.arange(self.engine.batch, device=self.engine.k.device)
            self.engine.select(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        self.engine = None

    @property
    def batch_size(self) -> int:
        return self.engine.batch if self.engine is not None else -1

    @property
    def is_initialized(self) -> bool:
        return self.engine is not None

    @property
    def is_linear(self) -> list[bool]:
        """All layers as one with a slot for each token; a cache that names no layer would be taken for a state without slots."""
        return [False]


class GraniteForCausalLM(GenerationMixin, nn.Module):  # type: ignore[misc]  # transformers is untyped to mypy
    """What transformers takes for a model. It has this name because pipelines look models up by the names of their classes."""

    main_input_name = "input_ids"
    input_modalities = "text"
    base_model_prefix = "model"
    _is_stateful = False

    def __init__(self, engine: Engine, generation_config: Any = None) -> None:
        super().__init__()
        self.engine = engine
        values = engine.config.to_dict()
        self.config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.generation_config = generation_config or GenerationConfig.from_model_config(self.config)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    @property
    def name_or_path(self) -> str:
        return self.config.name_or_path

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def tie_weights(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing to do: a tied head is the embedding's Weight itself."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any) -> None:
        if not generation_config.use_cache:
            return
        if generation_config.cache_implementation not in OWN_CACHE:
            raise GraniteError(
                f"cache_implementation is {generation_config.cache_implementation!r}: this model has a cache of its own, leave it out"
            )
        if model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = ViewCache()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ViewCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        cache: ViewCache | None = None,
        **unused: Any,
    ) -> Any:
        """Logits of input_ids [batch, tokens] in transformers' output class. Raises GraniteError for what the engine doesn't give."""
        given = sorted(name for name, value in unused.items() if value is not None and value is not False)
        if given:
            raise GraniteError(f"this view doesn't take {', '.join(given)}: it computes logits from input_ids, for inference")
        if input_ids is None:
            raise GraniteError("input_ids are needed: the view takes no embeddings")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, ViewCache):
            raise GraniteError(f"{CACHE} is a {type(cache).__name__}: expected the one that this view handed back")
        cached = use_cache is not False
        if cache is None and cached:
            cache = ViewCache()
        out = self.engine(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache.engine if cache is not None else None,
            use_cache=cached,
            logits_to_keep=logits_to_keep,
        )
        if cache is not None:
            cache.engine = out.past_key_values
        result = CausalLMOutputWithPast(logits=out.logits, **{CACHE: cache})
        return result.to_tuple() if return_dict is False else result
