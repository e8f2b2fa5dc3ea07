"""`granite-kernels profile`: one prefill and some decode steps, by role and by kernel, and a timeline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from granite_kernels.model.cli_options import MODEL, model_options, with_options

if TYPE_CHECKING:
    from granite_kernels.model.model import GraniteForCausalLM

    from .attribution import Spent
    from .profiling import Phase, Profile
    from .roof import Roof

LARGE = 10**9  # parameters that a token uses: on a CPU a few tokens take a minute then
KERNELS = 12  # rows of the table by kernel; --json has all
EAGER = {
    "cuda": "Kernels are those of eager passes: a captured step replays the same ones, but launches none that could be asked whose it is.",
    "cpu": "Plain PyTorch on a CPU: kernels are torch's operations.",
}
ROOF = "roof: the least time that the measured roof leaves for these bytes and operations, as a share of the time taken."


@click.command("profile")
@click.argument("model", metavar="MODEL")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Default: 256; 32 for a large model on a CPU.")
@click.option("--new-tokens", type=click.IntRange(2), help="One more than the decode steps. Default: 8; 4 for a large model on a CPU.")
@click.option("--trace", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Timeline for ui.perfetto.dev.")
@click.option("--proton", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Triton's own profile; needs a GPU.")
@click.option("--nvtx", is_flag=True, help="No profiler and no tables: the ranges alone, for Nsight around it; needs a GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@with_options(MODEL)
def profile(
    model: str,
    prompt_tokens: int | None,
    new_tokens: int | None,
    trace: Path | None,
    proton: Path | None,
    nvtx: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Profile one prefill and some decode steps of MODEL: time, bytes and share of the roof by role and by kernel."""
    from granite_kernels.model.progress import loading_bar
    from granite_kernels.model.sources import open_model

    from granite_kernels.errors import GraniteError

    from .profiling import STEPS, check, mark
    from .profiling import profile as run
    from .proton import record

    for path in (trace, proton):
        if path is not None and not path.resolve().parent.is_dir():
            raise GraniteError(f"{path}: there is no such folder to write to; make it first")
    if proton is not None:
        check("--proton")
    if nvtx:
        check("--nvtx")
    loaded = open_model(model, **model_options(values))
    short = loaded.device.type == "cpu" and loaded.config.active_parameters() > LARGE
    prompt_tokens, new_tokens = prompt_tokens or (32 if short else 256), new_tokens or (4 if short else 8)
    if nvtx:
        mark(loaded, prompt_tokens, new_tokens)
        return
    with loading_bar(STEPS, "profiling") as bar:
        found = run(loaded, prompt_tokens, new_tokens, trace, bar)
    files = {"trace": trace, "proton": record(loaded, prompt_tokens, new_tokens, proton) if proton is not None else None}
    if as_json:
        told = {"model": model, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, **plain(loaded, found)}
        click.echo(json.dumps(told | {name: str(path) for name, path in files.items() if path is not None}))
        return
    show(model, loaded, found, prompt_tokens)
    for name, path in files.items():
        if path is not None:
            click.echo(f"{name}: {path}")


def plain(model: GraniteForCausalLM, found: Profile) -> dict[str, Any]:
    """The profile as plain JSON data; seconds, bytes, operations."""

    def row(spent: Spent) -> dict[str, Any]:
        return {**dataclasses.asdict(spent), "roof_seconds": _least(spent, found.roof)}

    phases = [
        {
            "phase": phase.name,
            "passes": phase.passes,
            "wall_seconds": phase.wall,
            "profiled_seconds": phase.profiled,
            "outside_seconds": phase.outside,
            "roles": [row(role) for role in phase.roles],
            "kernels": [row(kernel) for kernel in phase.kernels],
        }
        for phase in found.phases
    ]
    return {
        "device": _device(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "note": EAGER[model.device.type],
        "roof": dataclasses.asdict(found.roof),
        "phases": phases,
    }


def _least(spent: Spent, roof: Roof) -> float | None:
    """Seconds that the roof leaves, None where nobody counted bytes."""
    return roof.seconds(spent.nbytes, spent.flops) if spent.nbytes else None


def _device(model: GraniteForCausalLM) -> str:
    if model.device.type == "cpu":
        return "CPU"
    import torch

    return torch.cuda.get_device_name(model.device)


def show(model: str, loaded: GraniteForCausalLM, found: Profile, prompt_tokens: int) -> None:
    """Print both tables of every phase, a pass of it on average."""
    from granite_kernels.model.cli_tables import console

    screen, roof = console(), found.roof
    screen.print(
        f"{model} on {_device(loaded)}, {str(loaded.dtype).removeprefix('torch.')}, prompt of {prompt_tokens:,} tokens; measured roof: "
        f"{roof.bandwidth / 1e9:,.1f} GB/s, {roof.matmul / 1e12:,.3g} TFLOP/s",
        soft_wrap=True,
    )
    for phase in found.phases:
        screen.print(f"\n{_title(phase)}", soft_wrap=True)
        screen.print(_table(phase, phase.roles, roof, "role"))
        screen.print(_table(phase, phase.kernels[:KERNELS], roof, "kernel", "role"))
    screen.print(f"\n{EAGER[loaded.device.type]} {ROOF}", soft_wrap=True)


def _title(phase: Phase) -> str:
    each = 1e3 / phase.passes
    name = phase.name if phase.passes == 1 else f"{phase.name}, a step of {phase.passes}"
    return (
        f"{name}: {phase.wall * each:,.2f} ms as generate does it; {phase.profiled * each:,.2f} ms under the profiler, "
        f"of which {phase.outside * each:,.2f} in no role"
    )


def _table(phase: Phase, rows: Any, roof: Roof, *names: str) -> Any:
    from granite_kernels.model.cli_tables import table

    shown = table(*names, "calls", "ms", "share", "MB", "GB/s", "GFLOP/s", "roof")
    for column in shown.columns[len(names) :]:
        column.justify = "right"
    for spent in rows:
        least, seconds = _least(spent, roof), max(spent.seconds, 1e-9)
        rates = (f"{amount / seconds / 1e9:,.1f}" for amount in (spent.nbytes, spent.flops))
        counted = (f"{spent.nbytes / phase.passes / 1e6:,.2f}", *rates, f"{least / seconds:.0%}") if least is not None else ("-",) * 4
        shown.add_row(
            *(getattr(spent, name) for name in names),
            f"{spent.calls / phase.passes:g}",
            f"{1e3 * spent.seconds / phase.passes:,.3f}",
            f"{spent.seconds / phase.profiled:.1%}",
            *counted,
        )
    return shown
