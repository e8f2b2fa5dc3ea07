"""`bench quality`: its figures against the same ones worked out from transformers' logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from granite_kernels.bench.cli_quality import markdown
from granite_kernels.bench.evidence import quality as told
from granite_kernels.bench.quality import compare, cut
from granite_kernels.model import cli
from granite_kernels.model.checkpoint import open_checkpoint
from safetensors.torch import load_file

from granite_kernels import formats
from granite_kernels.errors import GraniteError
from tests import tiny, tiny_gguf, tokenizer_cases

CPU = torch.device("cpu")
TEXT = "the quick brown fox jumps over the lazy dog and then the other dog looks at the fox, 1 2 3 and so on\n" * 3


def test_the_figures_are_those_of_their_definitions(tmp_path: Path) -> None:
    theirs, ids = tiny.make(), tiny.prompts(1, 70)[0].tolist()
    folder = tiny.save(theirs, tmp_path)
    with open_checkpoint(folder) as checkpoint:
        reference, row = compare(checkpoint, ids, ["q8_0"], context=32, dtype=torch.float32, device=CPU)
    windows = torch.tensor(ids[:64]).view(2, 32)
    with torch.no_grad():
        p = theirs(windows).logits[:, 16:-1].double().log_softmax(-1)
        for name, tensor in load_file(folder / "model.safetensors").items():
            if tensor.dim() == 2:
                theirs.get_parameter(name).copy_(formats.get("q8_0").unpack(formats.get("q8_0").quantize(tensor), tensor.shape))
        q = theirs(windows).logits[:, 16:-1].double().log_softmax(-1)
    following = windows[:, 17:, None]
    losses = [-x.gather(-1, following).mean().item() for x in (p, q)]
    divergence = (p.exp() * (p - q)).sum(-1)
    assert reference.perplexity == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert row.perplexity == pytest.approx(math.exp(losses[1]), rel=1e-5)
    assert row.change == pytest.approx(math.exp(losses[1] - losses[0]) - 1, abs=1e-6)
    assert row.kl == pytest.approx(divergence.mean().item(), rel=0.01, abs=1e-7)
    assert row.top1 == (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert (reference.kl, reference.top1, reference.bits_per_weight) == (0, 1, 16)
    assert row.bits_per_weight == pytest.approx(8.5, abs=0.05)


def test_packed_weights_are_their_own_reference(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_gguf.write(tiny.make(), path, "Q8_0")
    with open_checkpoint(path) as checkpoint:
        _, same = compare(checkpoint, tiny.prompts(1, 32)[0].tolist(), ["q8_0"], context=32, dtype=torch.float32, device=CPU)
    assert same.kl == pytest.approx(0, abs=1e-9) and same.top1 == 1  # Q8_0 of Q8_0 is itself


def test_windows() -> None:
    assert cut(range(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(range(5), 8).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(GraniteError, match="the text has 3 tokens"):
        cut(range(3), 8)


def test_the_verb_prints_a_table_and_writes_what_plan_quotes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tokenizer_cases.make_folder(tiny.save(tiny.make(vocab_size=512), tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.guarded(lambda: cli.cli.main(["bench", "quality", *arguments], prog_name="granite-kernels", standalone_mode=False))
        return code, *capsys.readouterr()

    common = (str(folder), "--text", str(text), "--formats", "int8,int4", "--context", "32")
    code, out, _ = call(*common, "--output", str(tmp_path / "results" / "quality"))
    assert code == 0 and [line.split()[0] for line in out.splitlines()[:4]] == ["format", "reference", "int8", "int4"]
    found = json.loads((tmp_path / "results" / "quality.json").read_text())
    assert (tmp_path / "results" / "quality.md").read_text() == markdown(found)
    assert told(tmp_path / "results")["int8"].startswith("KL ")
    for arguments, said in (
        ((str(folder), "--text", str(tmp_path / "none.txt")), "can't be read as text"),
        ((*common, "--formats", "q9"), "--formats has 'q9'; expected some of int8"),
        (("random:3.1-2b", "--text", str(text)), "random weights"),
    ):
        code, _, err = call(*arguments)
        assert code == 2 and said in err and err.count("\n") == 1
