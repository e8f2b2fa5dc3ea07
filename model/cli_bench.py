"""`bench` and its sub-verbs, which live in granite_kernels.bench; the command line is the roof over both."""

from __future__ import annotations

import importlib

import click

SUBVERBS = {"offline": ("granite_kernels.bench.offline.cli", "offline")}


class SubVerbs(click.Group):
    """Sub-verbs, imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBVERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBVERBS:
            return None
        module, name = SUBVERBS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=SubVerbs)
def bench() -> None:
    """Benchmarks."""
