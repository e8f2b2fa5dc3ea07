"""`granite-kernels bench quality`: perplexity, KL divergence and top-1 agreement by format, as a table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="A file of text in UTF-8.")
@click.option("--formats", default="int8,q8_0,q6_k,q4_k_m,int4", show_default=True, help="Quantizations, separated by commas.")
@click.option("--context", type=click.IntRange(4), default=512, show_default=True, help="Tokens of a window; its second half is judged.")
@click.option("--tokens", type=click.IntRange(4), default=None, help="Use only so many tokens of the text.")
@click.option("--dtype", default="auto", show_default=True, help="Of the reference: auto is float32 on a CPU, the checkpoint's on a GPU.")
@click.option("--device", default=None, help="cuda, cuda:1 or cpu. Default: the first GPU, else the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.option("--output", type=click.Path(path_type=Path), help="Write PATH.json and PATH.md, too.")
def quality(
    model: str,
    text: Path,
    formats: str,
    context: int,
    tokens: int | None,
    dtype: str,
    device: str | None,
    as_json: bool,
    output: Path | None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of MODEL's quantizations against MODEL, over a text.

    MODEL's own weights are the reference: its 16 or 32 bits, or, where it is packed already, what its blocks stand for.
    """
    found = report(model, text, formats.split(","), context, tokens, dtype, device)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        output.with_suffix(".md").write_text(markdown(found))
    if as_json:
        click.echo(json.dumps(found))
        return
    from granite_kernels.model.cli_tables import console, table

    screen, (columns, *rows) = console(), cells(found)
    drawn = table(*columns)
    for row in rows:
        drawn.add_row(*row)
    screen.print(drawn)
    screen.print(told(found["header"]), soft_wrap=True)


def report(
    model: str, text: Path, quantizations: list[str], context: int, tokens: int | None, dtype: str, device: str | None
) -> dict[str, Any]:
    """Everything that the table shows, as plain JSON data: a header and a row for each model."""
    import torch
    from granite_kernels.model.checkpoint import open_checkpoint
    from granite_kernels.model.loading import resolve_device, resolve_dtype
    from granite_kernels.model.progress import loading_bar
    from granite_kernels.model.sources import RANDOM, resolve
    from granite_kernels.model.tokenizer import load_tokenizer

    from granite_kernels.errors import GraniteError
    from granite_kernels.formats.mix import QUANTIZATIONS

    from .machine import header
    from .quality import METHOD, compare, cut

    unknown = [name for name in quantizations if name not in QUANTIZATIONS]
    if unknown:
        raise GraniteError(f"--formats has {', '.join(map(repr, unknown))}; expected some of {', '.join(QUANTIZATIONS)}")
    if model.startswith(RANDOM):
        raise GraniteError("random weights have no quality to lose; give a checkpoint, or demo")
    where = resolve_device(device)
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GraniteError(f"{text}: can't be read as text: {error}; give a file in UTF-8") from error
    with open_checkpoint(resolve(model)) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        if tokenizer is None:
            raise GraniteError(f"{checkpoint.path}: holds no tokenizer, which a text needs")
        kind = resolve_dtype(dtype, torch.float32 if where.type == "cpu" else checkpoint.config.dtype)
        ids = tokenizer.encode(content)[:tokens]
        windows = cut(ids, context)
        with loading_bar(len(windows) * (1 + len(quantizations)), "windows") as bar:
            rows = compare(checkpoint, ids, quantizations, context=context, dtype=kind, device=where, advance=lambda: bar(""))
        named = [{"kind": "quality", "model": model, **dataclasses.asdict(row)} for row in rows]
        facts = header(
            where,
            method=METHOD,
            model=model,
            reference="the values of its packed weights" if checkpoint.packed else str(checkpoint.config.dtype).removeprefix("torch."),
            text=text.name,
            tokens=windows.numel(),
            judged=windows.shape[0] * (windows.shape[1] - windows.shape[1] // 2 - 1),
            context=windows.shape[1],
            dtype=str(kind).removeprefix("torch."),
        )
    return {"header": facts, "rows": named}


def cells(found: dict[str, Any]) -> list[list[str]]:
    """The table: a row of names, and one for each model."""
    lines = [["format", "bits/weight", "perplexity", "change", "KL", "KL 99%", "top-1"]]
    for row in found["rows"]:
        changed = "" if row["format"] == "reference" else f"{row['change']:+.2%} ± {row['change_error']:.2%}"
        figures = f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.3f}", changed, f"{row['kl']:.5f}", f"{row['kl99']:.4f}"
        lines.append([row["format"], *figures, f"{row['top1']:.2%}"])
    return lines


def told(header: dict[str, Any]) -> str:
    """What was measured, in a sentence."""
    return (
        f"{header['model']} against {header['reference']}, computed in {header['dtype']} on {header['device']}; {header['text']}, "
        f"{header['judged']:,} judged of {header['tokens']:,} tokens in windows of {header['context']}; KL in nats."
    )


def markdown(found: dict[str, Any]) -> str:
    """The table for documents."""
    columns, *rows = (f"| {' | '.join(line)} |" for line in cells(found))
    return "\n".join([columns, "|" + "---|" * len(cells(found)[0]), *rows, "", told(found["header"]), ""])
