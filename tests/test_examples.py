"""Every example of the seams to transformers runs, on a tiny model with a tokenizer beside it."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest
from granite_kernels.model.hf import decode

from tests import tiny, tiny_hf

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PRINTED = {
    "accelerate_their_model": ("model.layers.0-1.block_sparse_moe.router", "the same tokens: True"),
    "engine_over_their_weights": ("every weight is shared: True", "bits per weight"),
    "fast_decode": ("w0",),
    "kernels_by_name": ("w",),
    "ours_in_transformers_places": ("'role': 'assistant'", "num_beams", "prompt_lookup_num_tokens"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.save(tiny_hf.make("granitemoe"), tmp_path_factory.mktemp("example"))
    tiny_hf.tokenizer().save_pretrained(path)
    return path


def test_every_example_is_known_here() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(PRINTED)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(example), str(folder)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    for text in PRINTED[example.stem]:
        assert text in printed
    decode.ENGINES.clear()
