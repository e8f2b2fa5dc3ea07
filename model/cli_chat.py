"""`chat`: an interactive session in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from granite_kernels.errors import GraniteError

from .cli_options import MODEL, SAMPLING, model_options, sampling_options, with_options

if TYPE_CHECKING:
    from .model import GraniteForCausalLM

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit ends; Ctrl-C stops an answer"


@click.command()
@click.argument("model", metavar="MODEL")
@with_options(SAMPLING, MODEL)
def chat(model: str, **values: Any) -> None:
    """An interactive session with MODEL. Commands: /reset, /system TEXT, /exit; Ctrl-C stops the answer."""
    from .sources import open_model

    loaded = open_model(model, **model_options(values))
    if loaded.tokenizer is None or loaded.tokenizer.chat_template is None:
        raise GraniteError(f"{model} has no chat template; use `generate --raw`")
    click.echo(HELP, err=True)
    Session(loaded, sampling_options(values)).run()


class Session:
    """The conversation: what was said, and the loop around it."""

    def __init__(self, model: GraniteForCausalLM, arguments: dict[str, Any]) -> None:
        self.model, self.arguments = model, arguments
        self.messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Read lines until /exit or the end of input."""
        while True:
            line = self._read()
            if line is None or line == "/exit":
                return
            if line == "/reset":
                self.messages = []
            elif line == "/system" or line.startswith("/system "):
                self._set_system(line.removeprefix("/system").strip())
            elif line.startswith("/"):
                click.echo(HELP, err=True)
            elif line:
                self._answer(line)

    def _read(self) -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            click.echo("(/exit ends)", err=True)
            return ""

    def _set_system(self, text: str) -> None:
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def _answer(self, line: str) -> None:
        asked = [*self.messages, {"role": "user", "content": line}]
        answer = ""
        try:
            for piece in self.model.stream(asked, **self.arguments):
                answer += piece
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo(" ...", nl=False)
            if not answer:  # stopped before the first word: as if it had not been asked
                click.echo()
                return
        except GraniteError as error:  # a prompt too long, say: the session goes on without it
            click.echo(f"error: {error}", err=True)
            return
        click.echo()
        self.messages = [*asked, {"role": "assistant", "content": answer}]
