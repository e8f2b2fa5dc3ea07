"""accelerate beside adapters, quantizers, hooks and autograd: what can't run on kernels runs as it did, and `status` says so."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import granite_kernels
from granite_kernels.errors import GraniteError
from granite_kernels.testing import assert_accurate
from tests import tiny, tiny_hf

IDS = tiny.prompts(2, 9)


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits


def quietly(model: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return granite_kernels.accelerate(model, **options)


def rows(model: Any) -> dict[str, Any]:
    return {row.module: row for row in granite_kernels.status(model)}


# ------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(a stock model, the folder of a LoRA adapter trained on it)."""
    from peft import LoraConfig, get_peft_model

    base = tiny_hf.make()
    targets = ["q_proj", "v_proj", "up_proj"]
    trained = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        trained(IDS, labels=IDS).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("lora")
    trained.save_pretrained(folder)
    return base, folder


@pytest.mark.parametrize("order", ["before", "after", "inside"])
def test_an_adapter_changes_the_logits_as_on_the_stock_model(adapter: tuple[Any, Path], order: str) -> None:
    from peft import PeftModel

    base, folder = adapter
    stock = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    eager, exact = logits(stock), logits(copy.deepcopy(stock).double())
    assert tiny.spread_error(eager, logits(base)) > 0.01
    model = copy.deepcopy(base)
    if order == "after":
        model = PeftModel.from_pretrained(quietly(model, backend="torch"), folder).eval()
    elif order == "before":
        model = quietly(PeftModel.from_pretrained(model, folder).eval(), backend="torch")
    else:
        wrapped = PeftModel.from_pretrained(model, folder).eval()
        quietly(model, backend="torch")
        model = wrapped
    found = logits(model)
    assert_accurate(found, exact, eager)
    table = rows(model)
    assert table["model.layers.0-1.self_attn.q_proj"].reason == "it is peft's Linear"
    assert table["model.layers.0-1.self_attn.k_proj"].reason == "self_attn.q_proj: it is peft's Linear"
    assert table["model.layers.0-1.self_attn.o_proj"].kernel == "reference.linear.linear_add"
    with model.disable_adapter():
        assert tiny.spread_error(logits(model), logits(base)) < 1e-5
    merged = model.merge_and_unload()
    assert tiny.spread_error(logits(merged), eager) < 1e-5
    assert "peft" not in str(granite_kernels.status(merged))


def test_an_adapter_trains_on_an_accelerated_model(adapter: tuple[Any, Path]) -> None:
    from peft import PeftModel

    losses = []
    for accelerated in (False, True):
        model = copy.deepcopy(adapter[0])
        if accelerated:
            quietly(model, backend="torch")
        model = PeftModel.from_pretrained(model, adapter[1], is_trainable=True).train(False)  # gradients in eval mode, too
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append([loss.item(), *(p.grad.norm().item() for p in model.parameters() if p.grad is not None)])
    assert len(losses[0]) > 12
    assert losses[0] == losses[1]


# ------------------------------------------------------------------ gradients, tracing, casting


def test_training_takes_the_stock_path_and_says_so() -> None:
    model, twin = tiny_hf.make(), tiny_hf.make()
    quietly(model, backend="torch")
    for one in (model, twin):
        one.train()
        one(IDS, labels=IDS).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert "no backward" in rows(model)["(training, gradients)"].reason


def test_a_compiled_model_is_the_stock_one_in_one_graph() -> None:
    model = tiny_hf.make()
    expected = logits(model)
    quietly(model, backend="torch")
    assert torch.equal(logits(torch.compile(model, backend="eager", fullgraph=True)), expected)


def test_autocast_is_left_to_transformers() -> None:
    model = tiny_hf.make()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
        assert torch.equal(logits(quietly(model, backend="torch")), expected)


# ------------------------------------------------------------------ other people's modules


class Quantized(nn.Linear):
    """Stands for a projection of bitsandbytes or another quantizer: a Linear by inheritance, whose weight isn't what it computes with."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 0.5


class Sharded(torch.Tensor):
    """Stands for a DTensor or a quantizer's parameter: a tensor of another class."""


def replaced(model: Any, name: str) -> Any:
    layer = model.model.layers[1]
    owner = layer.mlp if hasattr(layer.mlp, name) else layer.self_attn
    old = getattr(owner, name)
    new = Quantized(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    setattr(owner, name, new)
    return model


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "gate_proj", "down_proj"])
def test_another_class_of_projection_is_called(name: str) -> None:
    model = replaced(tiny_hf.make(), name)
    expected = logits(model)
    quietly(model, backend="torch")
    assert tiny.spread_error(logits(model), expected) < 1e-5
    block = "self_attn" if name in ("q_proj", "o_proj") else "mlp"
    row = rows(model)[f"model.layers.1.{block}.{name}"]
    assert (row.kernel, row.reason) == ("transformers", "it is test_accelerate_limits's Quantized")
    assert rows(model)[f"model.layers.0.{block}.{name}"].kernel != "transformers"


def test_another_class_of_parameter_is_left_alone() -> None:
    model = tiny_hf.make()
    projection = model.model.layers[0].mlp.up_proj
    weight = projection.weight.detach().as_subclass(Sharded)
    weight._is_param = True
    projection.weight = nn.Parameter(weight)
    quietly(model, backend="torch")
    assert "its weight is a Sharded" in rows(model)["model.layers.0.mlp.up_proj"].reason


def test_sharded_weights_are_called_as_they_stand() -> None:
    from torch import distributed
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model, mesh = tiny_hf.make(), distributed.device_mesh.init_device_mesh("cpu", (1,))
        expected = logits(model)

        def shard(name: str, module: nn.Module, mesh: Any) -> None:
            for key, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))

        for projection in (model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.down_proj):
            distribute_module(
                projection,
                mesh,
                shard,
                lambda _, inputs, mesh: (DTensor.from_local(inputs[0], mesh, [Replicate()]),),
                lambda _, output, mesh: output.to_local(),
            )
        quietly(model, backend="torch")
        assert tiny.spread_error(logits(model), expected) < 1e-5
        assert rows(model)["model.layers.0.self_attn.k_proj"].kernel == "transformers"
        reasons = {rows(model)[f"model.layers.{name}"].reason for name in ("0.self_attn.q_proj", "1.mlp.down_proj")}
        assert reasons <= {"its weight is a DTensor", "hooks are registered on it"}
    finally:
        distributed.destroy_process_group()


def test_biases_are_honoured() -> None:
    model = tiny_hf.make("llama", attention_bias=True, mlp_bias=True)
    expected = logits(model)
    quietly(model, backend="torch")
    assert tiny.spread_error(logits(model), expected) < 1e-5
    assert rows(model)["model.layers.0-1.self_attn.o_proj"].reason == "it has a bias"


def test_offloaded_weights_are_left_to_accelerate() -> None:
    from accelerate import cpu_offload

    model = tiny_hf.make()
    expected = logits(model)
    cpu_offload(model, execution_device="cpu")
    quietly(model, backend="torch")
    assert tiny.spread_error(logits(model), expected) < 1e-5
    assert "accelerate's hooks move its weights" in str(granite_kernels.status(model))


def test_scaled_rotations_are_transformers_own() -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_hf.make("llama", rope_parameters=scaling | {"original_max_position_embeddings": 512})
    expected = logits(model)
    assert tiny.spread_error(logits(quietly(model, backend="torch")), expected) < 1e-5


# ------------------------------------------------------------------ masks


def block_mask() -> torch.Tensor:
    """Two texts in one row: a token sees its own."""
    text = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    return ((text[:, None] == text) & torch.ones(9, 9, dtype=torch.bool).tril())[None, None].expand(2, 1, 9, 9)


def test_a_mask_that_is_no_padding_goes_to_transformers() -> None:
    model = tiny_hf.make()
    expected = logits(model, attention_mask=block_mask())
    quietly(model, backend="auto")
    assert tiny.spread_error(logits(model, attention_mask=block_mask()), expected) < 1e-5
    assert rows(model)["(some calls)"].reason == "an attention mask that isn't left padding needs transformers' attention"
    with pytest.raises(GraniteError, match="backend 'torch' can't be honoured: an attention mask"):
        logits(quietly(model, backend="torch"), attention_mask=block_mask())


def test_packed_rows_go_to_transformers() -> None:
    model = tiny_hf.make()
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = dict(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2), cu_seq_lens_q=starts, cu_seq_lens_k=starts, use_cache=False)
    expected = logits(model, **packed)
    quietly(model, backend="auto")
    assert tiny.spread_error(logits(model, **packed), expected) < 1e-5
    assert "packs several sequences" in rows(model)["(some calls)"].reason


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_each_implementation_are_read(implementation: str) -> None:
    model = tiny_hf.make()
    model.set_attn_implementation(implementation)
    prompts = tiny_hf.padded_prompts(2, 9)
    real = prompts["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**prompts).logits[real]
        quietly(model, backend="torch")
        assert tiny.spread_error(model(**prompts).logits[real], expected) < 1e-5


# ------------------------------------------------------------------ what is refused


def test_an_unsupported_model_raises_and_lists_what_is_supported() -> None:
    import transformers

    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=tiny.VOCAB))
    for function in (granite_kernels.accelerate, granite_kernels.restore, granite_kernels.status):
        with pytest.raises(
            GraniteError, match=r"GPT2LMHeadModel isn't supported; expected .*GraniteMoeSharedForCausalLM, LlamaForCausalLM"
        ):
            function(other)


def test_auto_says_once_what_it_does_instead(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_hf.make()
    granite_kernels.accelerate(model)
    logits(model)
    said = [str(warning.message) for warning in recwarn if "granite_kernels.status" in str(warning.message)]
    assert len(said) == 1
    assert "the interpreter is for tests; ask for backend='triton'" in said[0]
    assert str(granite_kernels.status(model)).splitlines()[0].split() == ["module", "kernel", "active", "reason"]


def test_an_explicit_backend_that_cannot_be_honoured_raises() -> None:
    wide = tiny_hf.make(head_dim=24, heads=4)
    with pytest.raises(GraniteError, match="backend 'triton' can't be honoured: kernels take heads of 16, 32, 64"):
        granite_kernels.accelerate(wide, backend="triton")
    assert not any("forward" in module.__dict__ for module in wide.modules())
    with pytest.raises(GraniteError, match="backend 'triton' can't be honoured: kernels take float32, bfloat16 and float16"):
        granite_kernels.accelerate(tiny_hf.make().double(), backend="triton")
    with pytest.raises(GraniteError, match="backend is 'cuda', expected one of auto, triton, torch"):
        granite_kernels.accelerate(wide, backend="cuda")


def test_strict_refuses_what_would_be_left_to_transformers() -> None:
    model = replaced(tiny_hf.make(), "down_proj")
    with pytest.raises(
        GraniteError, match=r"model\.layers\.1\.mlp\.down_proj can't be accelerated: it is test_accelerate_limits's Quantized; strict=False"
    ):
        granite_kernels.accelerate(model, backend="torch", strict=True)
    assert not any("forward" in module.__dict__ for module in model.modules())
