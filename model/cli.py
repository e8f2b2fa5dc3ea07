"""The command line: one verb a function, each importing what it needs when it runs, so that --help costs nothing."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from granite_kernels import __version__
from granite_kernels.errors import GraniteError

VERBS = {  # verb: the module, relative to this one where it is of the model's, and its command
    "generate": (".cli_generate", "generate"),
    "chat": (".cli_chat", "chat"),
    "inspect": (".cli_inspect", "inspect"),
    "profile": ("granite_kernels.bench.cli_profile", "profile"),
    "plan": ("granite_kernels.bench.cli_plan", "plan"),
    "quantize": (".cli_quantize", "quantize"),
    "doctor": (".cli_doctor", "doctor"),
    "bench": (".cli_bench", "bench"),
}
SUMMARIES = {
    "generate": "Stream a completion.",
    "chat": "An interactive session.",
    "inspect": "What a checkpoint holds, without loading it.",
    "profile": "Time, bytes and share of the roof by role and by kernel, and a timeline.",
    "plan": "Memory by format, the GPUs it fits, and the speed that they allow.",
    "quantize": "Write a checkpoint quantized: a GGUF file, or safetensors.",
    "doctor": "GPU, driver, torch, triton, compiler, caches.",
    "bench": "Tokens/s and memory beside others; kernels, offline, quality, compare.",
}


class Verbs(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, name = VERBS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module, __package__), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, SUMMARIES[verb]) for verb in VERBS])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="granite-kernels")
def cli() -> None:
    """IBM Granite 3.1 on one NVIDIA GPU. MODEL is a hub id, a folder, a .gguf file, demo, or random:PRESET."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb. Bad input is one line on standard error and exit code 2; Ctrl-C is 130; a closed pipe is quiet."""
    sys.exit(guarded(lambda: cli.main(arguments, prog_name="granite-kernels", standalone_mode=False)))


def guarded(run: Callable[[], Any]) -> int:
    """The exit code of `run`, with what people do wrong told in one line."""
    try:
        code = run()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return complain(error.format_message())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush is quiet, too
        return 0
    except (GraniteError, OSError) as error:
        return complain(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return complain(f"out of memory: {error}; a smaller --quantization, --dtype or --max-context needs less")


def complain(message: str) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return 2
