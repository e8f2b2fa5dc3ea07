"""`doctor`: kernels that are tried one by one, and versions that are too old."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import pytest
import torch
from granite_kernels.model import cli_doctor
from granite_kernels.model.config import GraniteConfig

from granite_kernels import GraniteForCausalLM, launch
from granite_kernels.launch import Target
from tests import tiny

CALLED = {
    "embed",
    "norm_qkv_rope_append",
    "attention",
    "attention_decode",
    "linear_add",
    "norm_gate_up_swiglu",
    "norm_logits",
    "sample_step",
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> GraniteForCausalLM:
    """A tiny model on the kernels, in Triton's interpreter, which few programs fill."""
    monkeypatch.setattr(launch, "INTERPRETED", Target(arch=90, sms=2))
    values = tiny.granite_config(num_hidden_layers=1)
    config = GraniteConfig.from_dict({**values, "model_type": "granite"})
    return GraniteForCausalLM.from_config(config, dtype=torch.float32, device="cpu", backend="triton")


def test_every_kernel_of_a_request_is_tried(interpreted: GraniteForCausalLM) -> None:
    rows = list(cli_doctor.verdicts(interpreted, "tiny"))
    assert all(good and "with compiling" in text for _, good, text in rows)
    assert {name for name, _, _ in rows} == {f"tiny: {role}" for role in CALLED}


def test_a_kernel_that_fails_is_named_and_the_others_are_tried_all_the_same(interpreted: GraniteForCausalLM) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shared memory:\n  what it needs " + "x" * 1000)

    interpreted._ops = dataclasses.replace(interpreted._ops, linear_add=broken)
    rows = {name.removeprefix("tiny: "): (good, text) for name, good, text in cli_doctor.verdicts(interpreted, "tiny")}
    assert {role for role, (good, _) in rows.items() if not good} == {"linear_add"}
    assert rows["linear_add"][1].startswith("kernels.linear.linear_add fails: RuntimeError: shared memory: what it needs x")
    assert len(rows["linear_add"][1]) == cli_doctor.LONGEST


def test_versions_that_are_too_old_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.9.1+cu128", "triton": "3.10.0", "transformers": "4.57.0"}.get)
    found = {name: (good, text) for name, good, text in cli_doctor.rows() if name in cli_doctor.NEEDED}
    assert found["torch"] == (False, "2.9.1+cu128: 2.11 or newer is needed")
    assert found["triton"] == (True, "3.10.0")
    assert found["transformers"] == (False, "4.57.0: 5 or newer is needed")
