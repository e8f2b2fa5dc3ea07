"""`bench` and its sub-verbs, which live in granite_kernels.bench; the command line is the roof over both."""

from __future__ import annotations

import importlib

import click

SUBVERBS = {
    "kernels": ("granite_kernels.bench.cli", "kernels"),
    "offline": ("granite_kernels.bench.offline.cli", "offline"),
    "compare": ("granite_kernels.bench.cli", "compare"),
    "report": ("granite_kernels.bench.cli", "report"),
    "quality": ("granite_kernels.bench.cli_quality", "quality"),
}
MODEL = ("granite_kernels.bench.cli", "model")  # the verb without a sub-verb: `bench MODEL`
HELP = ("-h", "--help")


class SubVerbs(click.Group):
    """Sub-verbs, imported when they are called; anything else is a MODEL and its options."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBVERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module, name = SUBVERBS.get(cmd_name, MODEL)
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in SUBVERBS and args[0] not in HELP:
            args = ["MODEL", *args]
        return super().parse_args(ctx, args)


@click.group(cls=SubVerbs)
def bench() -> None:
    """Benchmarks of a MODEL end to end (`bench MODEL --help`), or of one of:"""
