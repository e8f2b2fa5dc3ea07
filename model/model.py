"""GraniteForCausalLM: the drop-in accelerated model class."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from granite_kernels.errors import GraniteError
from granite_kernels.ops import Choice, Ops, choose, why_not_triton
from granite_kernels.reference.rope import rotary_table
from granite_kernels.weight import DENSE, Part
from granite_kernels.workspace import Workspace

from . import generate as generation
from . import granite, memory, warmup
from .cache import Cache, round_up
from .config import GraniteConfig
from .graph import CapturedStep, warm
from .hf import import_hf
from .loading import Table, load, random_weights
from .request import Request, check_ids, check_mask, make_request
from .step import State
from .text import pieces
from .tokenizer import Tokenizer


@dataclasses.dataclass
class CausalLMOutput:
    """logits [batch, tokens, vocab], of the last `logits_to_keep` positions where that was given; the cache, or None."""

    logits: Tensor
    past_key_values: Cache | None = None


class GraniteForCausalLM(nn.Module):
    """A Granite (or Llama-shaped) language model on one device. Build it with `from_pretrained` or `from_config`."""

    def __init__(
        self,
        config: GraniteConfig,
        weights: granite.Weights,
        *,
        backend: str,
        tokenizer: Tokenizer | None = None,
        max_context: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.weights, self.tokenizer, self.backend = config, weights, tokenizer, backend
        if max_context is not None and not 0 < max_context <= config.max_position_embeddings:
            raise GraniteError(
                f"max_context is {max_context}, expected 1 to {config.max_position_embeddings}, the checkpoint's max_position_embeddings"
            )
        self.max_context = max_context or config.max_position_embeddings
        self.last_stats = generation.Stats()
        self._busy = False
        self._prepare()

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> GraniteForCausalLM:
        """Load a hub id, a folder with config.json and *.safetensors, or a .gguf file.

        Options: quantization, dtype, device, backend, max_context, revision, cache_dir, token, local_files_only; transformers'
        torch_dtype and device_map are taken too. Errors: GraniteError, naming the file and the tensor or field.
        """
        loaded = load(source, **options)
        return cls(loaded.config, loaded.weights, backend=loaded.backend, tokenizer=loaded.tokenizer, max_context=loaded.max_context)

    @classmethod
    def from_config(
        cls,
        config: GraniteConfig | str,
        *,
        seed: int = 0,
        quantization: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> GraniteForCausalLM:
        """The same model with random weights, made on the device. `config` is a GraniteConfig or a preset's name, "3.1-2b"."""
        config = GraniteConfig.preset(config) if isinstance(config, str) else config
        return cls(config, random_weights(config, seed, quantization, dtype, device, backend), backend=backend)

    @classmethod
    def from_transformers(cls, hf_model: Any, *, backend: str = "auto", max_context: int | None = None) -> GraniteForCausalLM:
        """This engine over the weights of a transformers Granite, GraniteMoe, GraniteMoeShared or Llama: their memory, no copy.

        It has no tokenizer: theirs goes beside it. Errors: GraniteError, naming the module that can't be shared.
        """
        config, weights = import_hf("engine").from_transformers(hf_model)
        return cls(config, weights, backend=backend, max_context=max_context)

    # ------------------------------------------------------------------ where it lives

    @property
    def device(self) -> torch.device:
        return self.weights.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.norm.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> GraniteForCausalLM:
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def _prepare(self) -> None:
        """Choose the operations for where the weights are, and drop all that belonged to another place."""
        self._workspace = self._make_workspace()
        self._ops: Ops = choose(self.backend, self.device, self.dtype, moe=self.config.is_moe, workspace=self._workspace)
        if self._ops.backend == "triton":
            for module in self.modules():
                if isinstance(module, Part):
                    module.make_row_major()
        self._rotary = rotary_table(0, self.config.head_dim, self.config.rope_theta, dtype=self.dtype, device=self.device)
        self._cache: Cache | None = None
        self._state: State | None = None
        self._logits: Tensor | None = None
        self._held: list[int] = []  # the tokens that the kept cache holds, for a batch of one
        self._captured: tuple[Any, CapturedStep] | None = None

    def _make_workspace(self) -> Workspace | None:
        """Scratch for the largest decode step, where kernels will run."""
        if self.backend == "torch" or (self.backend == "auto" and self.device.type != "cuda"):
            return None
        if why_not_triton(self.device, self.dtype) is not None:
            return None
        from .scratch import workspace_size  # brings triton

        return Workspace.allocate(*workspace_size(self.config, self.weights.norm, self.weights), self.device)

    def _engine(self, context: int) -> generation.Engine:
        if self._rotary.shape[0] < context:
            rows = round_up(context, 4096)
            self._rotary = rotary_table(rows, self.config.head_dim, self.config.rope_theta, dtype=self.dtype, device=self.device)
        return generation.Engine(self.config, self.weights, self._ops, self._rotary)

    # ------------------------------------------------------------------ forward

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits for input_ids [batch, tokens]; attention_mask [batch, past + tokens] with padding on the left only.

        A cache that is handed back belongs to the caller: it is changed only by calls that it is passed to.
        """
        ids = check_ids(input_ids, self.config.vocab_size).to(self.device)
        batch, tokens = ids.shape
        past = past_key_values.length if past_key_values is not None else 0
        total = past + tokens
        if total > self.max_context:
            raise GraniteError(f"{total} tokens are more than the context of {self.max_context}")
        cache = past_key_values
        if cache is None:
            cache = Cache.allocate(self.config, batch, total, dtype=self.dtype, device=self.device)
        elif cache.batch != batch:
            raise GraniteError(f"past_key_values holds a batch of {cache.batch}, input_ids one of {batch}")
        cache.grow(total)
        if attention_mask is not None:
            present = check_mask(attention_mask, (batch, total))
            cache.starts.copy_((~present).sum(1))
        positions = generation.slot_positions(cache.starts, past, tokens)
        if position_ids is not None:
            positions = position_ids.to(device=self.device, dtype=torch.int32).expand(batch, tokens)
        engine = self._engine(max(total, int(positions.max()) + 1) if position_ids is not None else total)
        keep = min(logits_to_keep, tokens) or tokens
        x = generation.hidden(engine, ids, positions, cache, keep)
        return CausalLMOutput(granite.logits(self.config, self.weights, x, self._ops), cache if use_cache else None)

    # ------------------------------------------------------------------ generation

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        if self._busy:
            raise GraniteError("this model is generating already: it serves one request at a time")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _run(self, request: Request, *, reuse: bool = False) -> Generator[list[int | None]]:
        """Tokens of a request, [batch] a step. With `reuse` the kept cache's common beginning isn't computed again."""
        with self._serving():
            need = request.prompt_tokens + request.max_new_tokens
            engine, cache, state = self._engine(need), self._take_cache(request, need), self._take_state(request)
            prompt = request.ids[0].tolist() if request.batch == 1 and not request.padded else []
            common = 0
            if reuse:
                common = next(
                    (n for n, (a, b) in enumerate(zip(prompt, self._held, strict=False)) if a != b), min(len(prompt), len(self._held))
                )
            cache.crop(min(common, max(len(prompt) - 1, 0)))
            cache.starts.copy_((~request.present).sum(1))
            self._held = []
            run = self._step_function(engine, state, cache)
            self.last_stats = stats = generation.Stats()
            new: list[int] = []
            try:
                for tokens in generation.generate(engine, request, cache, state, run, stats):
                    if prompt and tokens[0] is not None:
                        new.append(tokens[0])
                    yield tokens
            finally:
                self._held = (prompt + new)[: cache.length] if prompt else []

    def _take_cache(self, request: Request, need: int) -> Cache:
        if self._cache is None or self._cache.batch != request.batch:
            self._cache = None  # the old one's memory first
            self._cache = Cache.allocate(self.config, request.batch, need, dtype=self.dtype, device=self.device)
            self._held = []
        self._cache.grow(need)
        return self._cache

    def _take_state(self, request: Request) -> State:
        if self._state is None or not self._state.fits(request.batch, request.max_new_tokens):
            self._state = State.allocate(request.batch, request.max_new_tokens, self.config.vocab_size, self.device)
        return self._state

    def _take_logits(self, request: Request) -> Tensor:
        """Where a step leaves its logits for a reader: at one address from request to request, for the sake of a captured graph."""
        shape = (request.batch, self.config.vocab_size)
        if self._logits is None or self._logits.shape != shape:
            self._logits = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._logits

    def _step_function(self, engine: generation.Engine, state: State, cache: Cache, out: Tensor | None = None) -> Any:
        run = generation.eager_step(engine, state, cache, out)
        if self.device.type != "cuda" or not self._capturable():
            return run
        buffers = (cache.k, cache.v, cache.lengths, state.ids, state.tokens, engine.rotary, *(() if out is None else (out,)))
        key = tuple((tensor.data_ptr(), tensor.shape) for tensor in buffers)  # an allocator gives an address twice, to other shapes
        if self._captured is None or self._captured[0] != key:
            self._captured = None
            with torch.no_grad():
                restore = state.snapshot(cache)
                warm(run, restore)
                if not self._capturable():  # a kernel doesn't compile, it shows when it is first called
                    return run
                self._captured = (key, CapturedStep(run, restore))
        return self._captured[1]

    def _capturable(self) -> bool:
        """PyTorch's operations ask the host for sizes, which a graph can't."""
        return all(choice.active for choice in self._ops.choices)

    def generate(
        self,
        input_ids: Any = None,
        *,
        attention_mask: Any = None,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        streamer: Any = None,
        stop: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Continue a batch of prompts: int64 [batch, prompt + new], the prompt included; ended rows are filled with the pad id.

        A row ends with an end token, or with the token that completes one of the `stop` strings (which needs a tokenizer).
        `streamer` has put(ids) and end(), as in transformers. Errors: GraniteError before anything is launched.
        """
        sampling = dict(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        request = self._request(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            seed=seed,
            eos_token_id=eos_token_id,
            stop=stop,
            **sampling,
        )
        if streamer is not None and request.batch > 1:
            raise GraniteError(f"a streamer takes one prompt, the batch has {request.batch}")
        guards = [self._stop_guard(request) for _ in range(request.batch)] if request.stop else []
        if streamer is not None:
            streamer.put(request.ids.cpu())
        new: list[list[int]] = []
        stopped = [False] * request.batch
        with contextlib.closing(self._run(request)) as steps:
            for tokens in steps:
                row = [request.pad if token is None or stopped[index] else token for index, token in enumerate(tokens)]
                new.append(row)
                if streamer is not None:
                    streamer.put(torch.tensor(row))
                for index, guard in enumerate(guards):
                    stopped[index] = stopped[index] or tokens[index] is None or guard(tokens[index])
                if guards and all(stopped):
                    break
        if streamer is not None:
            streamer.end()
        added = torch.tensor(new, dtype=torch.int64, device=request.ids.device).T
        return torch.cat((request.ids, added), dim=1)

    def _request(self, input_ids: Any, **arguments: Any) -> Request:
        if input_ids is None:
            raise GraniteError("generate needs input_ids, [batch, tokens]")
        return make_request(self.config, self.device, input_ids, limit=self.max_context, **arguments)

    def _stop_guard(self, request: Request) -> Any:
        from .text import StopText

        decoder, guard = self._need_tokenizer("stop strings").stream_decoder(skip_special_tokens=True), StopText(request.stop)

        def ended(token: int) -> bool:
            guard.push(decoder.push(token))
            return guard.stopped or token in request.eos

        return ended

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise GraniteError(f"{what} need a tokenizer, and the source of this model holds none; pass token ids to generate instead")
        return self.tokenizer

    def stream(self, prompt_or_messages: str | Sequence[Mapping[str, Any]], **arguments: Any) -> Iterator[str]:
        """Pieces of text as they are decoded. A string is continued as it stands; messages go through the chat template.

        Takes the arguments of `generate`, and `tools` and `documents` for the template.
        """
        tokenizer = self._need_tokenizer("text prompts")
        template = {name: arguments.pop(name) for name in ("tools", "documents") if name in arguments}
        if isinstance(prompt_or_messages, str):
            if any(value is not None for value in template.values()):
                raise GraniteError("tools and documents go with messages, not with a plain prompt")
            ids = tokenizer.encode(prompt_or_messages)
        else:
            ids = tokenizer.apply_chat_template(list(prompt_or_messages), add_generation_prompt=True, tokenize=True, **template)
        request = self._request([ids] if ids else [], **arguments)
        return self._pieces(request, tokenizer, reuse=not isinstance(prompt_or_messages, str))

    def _pieces(self, request: Request, tokenizer: Tokenizer, *, reuse: bool) -> Iterator[str]:
        with contextlib.closing(self._run(request, reuse=reuse)) as steps:
            yield from pieces((token for (token,) in steps if token is not None), tokenizer, request.stop, request.eos)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, documents: Any = None, **arguments: Any) -> str:
        """The assistant's answer. Consecutive calls reuse the cache of the longest common beginning."""
        return "".join(self.stream(messages, tools=tools, documents=documents, **arguments))

    # ------------------------------------------------------------------ in transformers' places

    def as_transformers(self) -> Any:
        """A view of this model, without a copy, that is transformers' GenerationMixin: for pipeline, its `generate`, lm-eval's HFLM.

        Raises GraniteError where transformers isn't installed.
        """
        hf = import_hf("view")
        return hf.GraniteForCausalLM(self)

    # ------------------------------------------------------------------ what it is

    def warmup(self, batch: int = 1, context: int | None = None) -> None:
        """Compile every kernel that this model launches, and capture the step for `batch` rows of up to `context` tokens (1,024).

        No later request compiles anything, whatever its batch and length; one with another batch, or with more tokens, captures its
        step anew. Raises GraniteError where there is no room for batch and context.
        """
        context = min(1024, self.max_context) if context is None else context
        packed = any(module.format != DENSE for module in self.modules() if isinstance(module, Part))
        mixture = dict(experts=self.config.num_local_experts, top_k=self.config.num_experts_per_tok) if self.config.is_moe else {}
        kernels, limit = self._ops.backend == "triton", self.max_context
        for rows, tokens, new in warmup.requests(batch, context, kernels=kernels, packed=packed, limit=limit, **mixture):
            self.generate(torch.zeros(rows, tokens, dtype=torch.int64), max_new_tokens=new, eos_token_id=[])

    def memory(self) -> memory.Memory:
        """Bytes by kind, those that a token reads, and the bits per weight."""
        return memory.measure(
            self.weights,
            top_k=self.config.num_experts_per_tok,
            cache=self._cache.nbytes if self._cache is not None else 0,
            workspace=self._workspace.nbytes if self._workspace is not None else 0,
        )

    def kernels(self) -> Table[Choice]:
        """One row a kernel role: role, kernel, active, reason."""
        return Table(self._ops.choices)
