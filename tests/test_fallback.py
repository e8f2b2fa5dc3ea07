"""A kernel that doesn't compile: PyTorch runs in its place and says so once, or the backend that was asked for raises."""

from __future__ import annotations

import warnings

import pytest
import torch
from granite_kernels.bench.offline.child import in_child
from triton.runtime import build

from granite_kernels.errors import GraniteError
from granite_kernels.fallback import Guarded
from tests import served


def test_auto_falls_back_for_that_operation() -> None:
    result = in_child(f"{served.__file__}:broken", "auto", interpret=False)
    (said,) = result["said"]
    assert said.startswith("sample_step runs in plain PyTorch, since its kernel doesn't compile: CompilationError")
    plain = {row["role"]: row for row in result["rows"] if not row["active"]}
    assert list(plain) == ["sample_step"]
    assert plain["sample_step"]["kernel"] == "reference.sample.sample_step"
    assert plain["sample_step"]["reason"] in said
    assert "_attention_decode_kernel" in result["launched"]
    assert "_sample_kernel" not in result["launched"]
    assert not result["captured"]  # a graph can't hold PyTorch's operations
    assert result["tokens"] == [1, 8]


def test_an_explicit_backend_raises() -> None:
    error = in_child(f"{served.__file__}:broken", "triton", interpret=False)["error"]
    assert "backend 'triton' can't be honoured for sample_step: its kernel doesn't compile" in error
    assert "use backend='auto' or 'torch'" in error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("an illegal memory access was encountered"),
        GraniteError("x has 3 columns"),
        torch.OutOfMemoryError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_raised(error: BaseException) -> None:
    def kernel(x: int) -> int:
        raise error

    guarded = Guarded("embed", kernel, lambda x: x, strict=False)
    with pytest.raises(type(error)):
        guarded(3)
    assert guarded.reason is None


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)

    def kernel(x: int) -> int:
        build._build("name", "no such source", ".", [], [], [], [])
        return -x

    guarded = Guarded("embed", kernel, lambda x: x, strict=False)
    with pytest.warns(RuntimeWarning, match="embed runs in plain PyTorch, since its kernel doesn't compile: .*compiler"):
        assert guarded(3) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guarded(4) == 4
