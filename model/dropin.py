"""The drop-in for transformers: what is public of model/hf, without its seconds of import until it is called."""

from __future__ import annotations

from typing import Any

from .hf import import_hf


def accelerate(hf_model: Any, *, backend: str = "auto", strict: bool = False) -> Any:
    """Put our kernels under one transformers model, in place, and return it; its class, weights and state_dict stay as they are.

    GraniteForCausalLM, GraniteMoeForCausalLM, GraniteMoeSharedForCausalLM and LlamaForCausalLM, also wrapped by PEFT. The layers,
    the last norm and the head get a forward in the instance; everything else is transformers' own: generate, caches, masks, saving.
    backend: "auto" is Triton on a GPU and plain PyTorch elsewhere, and warns once of what isn't on kernels; "triton"
    and "torch" are taken at their word or refused. strict: raise where a module would be left to transformers.

    Left alone, and listed by `status`: projections of other classes (PEFT's, bitsandbytes', other quantizers'), sharded weights
    (DTensor), biases, whatever has a hook or another library's forward on it, accelerate's offloading. An adapter that is added
    later is honoured. Under autograd, autocast and torch.compile the stock forward runs. A deepcopy stays accelerated, over its own
    weights; pickling gives a stock model. Raises GraniteError.
    """
    return import_hf("accelerate").accelerate(hf_model, backend=backend, strict=strict)


def restore(hf_model: Any) -> Any:
    """Undo `accelerate` exactly, and return the model: every instance has the forward that it had before, most of them none."""
    return import_hf("accelerate").restore(hf_model)


def status(hf_model: Any) -> Any:
    """What runs for each module now: rows of module, kernel, active and reason, which print as a table."""
    return import_hf("status").status(hf_model)


def register() -> None:
    """Make attn_implementation="granite_kernels" and experts_implementation="granite_kernels" known to transformers.

    An entry in their own tables of implementations: models that don't ask for it are as before. Calling it again changes nothing.
    """
    import_hf("interfaces").register()


def fast_decode(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """For transformers' generate: model.generate(..., custom_generate=granite_kernels.fast_decode).

    Their preparation, logits processors, stopping criteria and streamers; our engine over the model's own weights, whose decode
    step is a CUDA graph on a GPU. Greedy decoding and sampling, with the tokens that theirs gives; no beams and no assistant. The
    model is one that `accelerate` supports, accelerated or not, or the view of `as_transformers`. Raises GraniteError.
    """
    decode = import_hf("decode").fast_decode
    return decode(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
