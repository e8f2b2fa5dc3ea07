"""What quantizing costs in quality: perplexity, KL divergence and top-1 agreement against the model in 16 or 32 bits.

The text is cut into windows of `context` tokens; the second half of each is judged, so that every judged token has at least half a
window before it. Over the judged positions, with p the reference's probabilities and q the quantized model's:

    perplexity   exp(mean(-ln q(next token)))
    kl           mean(sum(p * ln(p / q))), in nats; kl99 is its 99th percentile
    top1         share of positions where the likeliest token of p and of q is the same

A quantized model is computed with its weights' values, dequantized, in the dtype of the reference: what differs are the weights alone.
Where a checkpoint is packed already, its values are the reference.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from granite_kernels.model.checkpoint import Checkpoint, Stored
from granite_kernels.model.model import GraniteForCausalLM
from granite_kernels.model.packing import values
from granite_kernels.model.weights import Loader, load_weights, prefers_column_major
from torch import Tensor

from granite_kernels import formats
from granite_kernels.errors import GraniteError
from granite_kernels.formats.mix import DENSE, format_of

METHOD = (
    "The second half of each window is judged. perplexity: exp of the mean negative log-likelihood. kl: mean over positions of "
    "sum(p ln(p / q)) in nats, p the reference's probabilities; kl99: its 99th percentile. top1: same likeliest token. Only the "
    "values of the weights differ."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One model's figures; `change` is the perplexity over the reference's, less one, with a standard error."""

    format: str
    bits_per_weight: float
    weight_bytes: int
    perplexity: float
    change: float
    change_error: float
    kl: float
    kl99: float
    top1: float


class Rounded(Checkpoint):
    """A checkpoint whose matrices have the values that they have in `quantization`; None: all as they are, but dense."""

    def __init__(self, inner: Checkpoint, quantization: str | None, dtype: torch.dtype) -> None:
        self.kind, self.path, self.config, self.gguf_metadata = inner.kind, inner.path, inner.config, inner.gguf_metadata
        self._inner, self._dtype = inner, dtype
        dense = str(dtype).removeprefix("torch.")
        self.tensors = {name: dataclasses.replace(info, format=dense) for name, info in inner.tensors.items()}
        layers, tied = inner.config.num_hidden_layers, inner.config.tie_word_embeddings
        self.formats = {
            name: DENSE if quantization is None else format_of(quantization, name, info.shape[-1], layers=layers, tied=tied)
            for name, info in inner.tensors.items()
        }

    @property
    def weight_bytes(self) -> float:
        """Of the weights in their formats, those that stay dense in 16 bits."""
        sizes = {name: math.prod(info.shape) for name, info in self.tensors.items()}
        return (
            sum(
                size * (16 if (format := self.formats[name]) == DENSE else formats.get(format).bits_per_weight)
                for name, size in sizes.items()
            )
            / 8
        )

    def read(self, name: str) -> Stored:
        stored = self._inner.read(name)
        dense = stored.data if stored.data.is_floating_point() and not stored.metadata else values(stored, torch.float32)
        if self.formats[name] != DENSE:
            format, matrix = formats.get(self.formats[name]), dense.reshape(-1, stored.shape[-1])
            dense = format.unpack(format.quantize(matrix), matrix.shape).view(stored.shape)
        return Stored(str(dense.dtype).removeprefix("torch."), dense, stored.shape)

    def close(self) -> None:
        """The inner checkpoint's owner closes it."""


def compare(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    quantizations: Sequence[str],
    *,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The reference and every quantization on `ids`; `advance` is called once a window and model. Raises GraniteError."""
    windows = cut(ids, context)
    judged = windows.shape[1] - windows.shape[1] // 2 - 1
    vocab = checkpoint.config.vocab_size
    with tempfile.TemporaryDirectory(prefix="granite-quality-") as scratch:
        shape = (windows.shape[0], judged, vocab)
        stored = torch.from_file(str(Path(scratch, "logits")), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)
        losses = torch.empty(shape[:2])
        model, source = _model(checkpoint, None, dtype, device, backend)
        for index, (logits, targets) in enumerate(_judged(model, windows)):
            stored[index] = logits.cpu()
            losses[index] = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()
            advance()
        reference = losses.mean().item()
        parameters = checkpoint.config.parameters()
        size = parameters * (2 if dtype.itemsize == 4 else dtype.itemsize)
        rows = [Row("reference", 8 * size / parameters, size, math.exp(reference), 0.0, 0.0, 0.0, 0.0, 1.0)]
        for quantization in quantizations:
            del model
            model, source = _model(checkpoint, quantization, dtype, device, backend)
            rows.append(_row(quantization, model, source, windows, stored, losses, advance))
        del stored
    return rows


def cut(ids: Sequence[int], context: int) -> Tensor:
    """Whole windows [windows, context] of the text's tokens; one shorter window where the text is short."""
    if context < 4 or len(ids) < 4:
        raise GraniteError(f"the text has {len(ids)} tokens and the context {context}; expected at least 4 of each, so give a longer text")
    width = min(context, len(ids))
    count = len(ids) // width
    return torch.tensor(ids[: count * width]).view(count, width)


def _model(
    checkpoint: Checkpoint, quantization: str | None, dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[GraniteForCausalLM, Rounded]:
    source = Rounded(checkpoint, quantization, dtype)
    weights = load_weights(Loader(source, dtype, device, prefers_column_major(device, dtype, backend)), checkpoint.config)
    return GraniteForCausalLM(checkpoint.config, weights, backend=backend), source


def _judged(model: GraniteForCausalLM, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """float32 logits [judged, vocab] and the tokens that follow, window by window."""
    half = windows.shape[1] // 2
    for window in windows.to(model.device):
        logits = model(window[None, :-1], use_cache=False, logits_to_keep=window.shape[0] - half - 1).logits[0].float()
        yield logits, window[half + 1 :]


def _row(
    quantization: str,
    model: GraniteForCausalLM,
    source: Rounded,
    windows: Tensor,
    stored: Tensor,
    losses: Tensor,
    advance: Callable[[], None],
) -> Row:
    own, divergence, same = torch.empty_like(losses), torch.empty_like(losses), torch.empty(losses.shape, dtype=torch.bool)
    for index, (logits, targets) in enumerate(_judged(model, windows)):
        own[index] = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()
        theirs, ours = stored[index].to(logits.device).log_softmax(-1), logits.log_softmax(-1)
        divergence[index] = (theirs.exp() * (theirs - ours)).sum(-1).cpu()
        same[index] = (theirs.argmax(-1) == ours.argmax(-1)).cpu()
        advance()
    difference = (own - losses).double().flatten()
    change = math.expm1(difference.mean().item())
    error = (1 + change) * difference.std().item() / math.sqrt(difference.numel()) if difference.numel() > 1 else 0.0
    return Row(
        quantization,
        8 * source.weight_bytes / model.config.parameters(),
        int(source.weight_bytes),
        math.exp(own.mean().item()),
        change,
        error,
        divergence.mean().item(),
        divergence.flatten().double().quantile(0.99).item(),
        same.float().mean().item(),
    )
