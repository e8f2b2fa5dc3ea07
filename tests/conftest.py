"""The session runs Triton's interpreter with its repairs; tests of compiled code start a process of their own; tests/gpu runs compiled."""

from __future__ import annotations

import os
import sys

GPU = any("tests/gpu" in argument.replace(os.sep, "/") for argument in sys.argv)
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported, and inherited by no compile process of ours
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for one another

from pathlib import Path  # noqa: E402  (the environment above must be set before anything imports triton)

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--granite-tokenizer", type=Path, default=None, help="a folder with Granite's own tokenizer, for the comparisons with transformers"
    )


@pytest.fixture(scope="session")
def granite_tokenizer_folder(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--granite-tokenizer")
    if folder is None:
        pytest.skip("give --granite-tokenizer FOLDER: Granite's tokenizer isn't ours to ship")
    return folder


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> None:
    """The stock interpreter computes nonsense in bfloat16: no test may meet it."""
    if not GPU:
        from granite_kernels.bench.offline import interpreter

        interpreter.install()
