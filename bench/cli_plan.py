"""`granite-kernels plan`: from the shapes alone, memory by format, the cards it fits, and the bound on their speed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from granite_kernels.model.config import GraniteConfig

    from .gpus import Gpu
    from .plan import Footprint

HERE = "here"
NOTE = (
    "GB are 10^9 bytes. file: what a GGUF of that type takes; weights: as they lie in memory. A card's cell: the most tokens/s that its "
    "bandwidth allows at this context and batch (measured ones in brackets), and the longest context that fits; - where nothing fits. "
    "quality: where it was measured, on which model, against its own weights in 16 bits (`bench quality`)."
)
GIVEN = "GB are 10^9 bytes; tokens/s at most: bandwidth over the bytes that a step reads, arithmetic and not a measurement."


@click.command()
@click.argument("model", metavar="PRESET|MODEL")
@click.option("--context", type=click.IntRange(1), default=4096, show_default=True, help="Tokens a row, prompt and answer.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--vram", type=click.FloatRange(0, min_open=True), help="Memory of a card in GB, as on its box.")
@click.option("--gpu", is_flag=False, flag_value=HERE, help="One card by its name; without a name, the one in this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def plan(model: str, context: int, batch: int, vram: float | None, gpu: str | None, as_json: bool) -> None:
    """Memory of PRESET or MODEL by format, the GPUs it fits, and the speed their bandwidth allows. No weights are loaded."""
    from granite_kernels.errors import GraniteError

    config, stored = _shapes(model)
    if context > config.max_position_embeddings:
        raise GraniteError(f"context is {context}, expected at most {config.max_position_embeddings}, the model's max_position_embeddings")
    cards = _cards(gpu, vram)
    found = rows(config, stored, cards, context, batch)
    if as_json:
        click.echo(json.dumps({"model": model, "parameters": config.parameters(), "context": context, "batch": batch, **found}))
        return
    _show(model, config, found, context, batch, one=gpu is not None or vram is not None)


def _shapes(model: str) -> tuple[GraniteConfig, dict[str, str] | None]:
    """The configuration that PRESET or MODEL names and, where its tensors are packed, their formats."""
    from pathlib import Path

    from granite_kernels.model.checkpoint import open_checkpoint
    from granite_kernels.model.config import PRESETS, GraniteConfig
    from granite_kernels.model.sources import RANDOM, resolve

    from granite_kernels.errors import GraniteError

    name = model.removeprefix(RANDOM)
    if name in PRESETS or name != model:
        return GraniteConfig.preset(name), None
    source = resolve(model)
    if not Path(source).exists() and "/" not in str(source):
        raise GraniteError(f"{model}: no such file or folder; expected one, a hub id, demo, or one of {', '.join(PRESETS)}")
    with open_checkpoint(source) as checkpoint:
        formats = {tensor: info.format for tensor, info in checkpoint.tensors.items()}
    packed = any(not format.startswith(("float", "bfloat")) for format in formats.values())
    return checkpoint.config, formats if packed else None


def _cards(name: str | None, vram: float | None) -> list[Gpu]:
    """The cards to hold the model against, the smallest memory first."""
    import dataclasses

    from .gpus import GPUS, Gpu, find, here

    if name is None and vram is None:
        return sorted(GPUS, key=lambda card: (card.memory, card.bandwidth))
    if name is None:
        return [Gpu(f"{vram:g} GB", vram or 0.0, 0, 90, "--vram")]
    card = here() if name == HERE else find(name)
    return [card if vram is None else dataclasses.replace(card, memory=vram)]


def rows(config: GraniteConfig, stored: dict[str, str] | None, cards: list[Gpu], context: int, batch: int) -> dict[str, Any]:
    """Everything that `plan` shows, as plain JSON data: formats by memory, and every card under each."""
    from .evidence import quality, speeds
    from .plan import footprints, need

    measured, judged = speeds(config), quality()
    formats = []
    for one in footprints(config, batch, stored):
        wanted = need(config, one, batch, context)
        formats.append(
            {
                "format": one.label,
                "bits_per_weight": one.bits_per_weight,
                "file_bytes": one.file,
                "weight_bytes": one.weights,
                "cache_bytes": wanted.cache,
                "workspace_bytes": wanted.workspace,
                "total_bytes": wanted.total,
                "read_bytes_per_step": one.read,
                "quality": judged.get(one.label),
                "gpus": [_held_against(config, one, card, context, batch, measured.get((card.name, one.label, batch))) for card in cards],
            }
        )
    return {"cache_bytes_per_token": _cache_bytes_per_token(config), "formats": formats}


def _cache_bytes_per_token(config: GraniteConfig) -> int:
    from .plan import activations

    return config.cache_bytes_per_token(activations(config))


def _held_against(config: GraniteConfig, weights: Footprint, card: Gpu, context: int, batch: int, measured: float | None) -> dict[str, Any]:
    from .plan import bound, fits, largest_context, need

    wanted = need(config, weights, batch, context, card.arch)
    return {
        "name": card.name,
        "memory_gb": card.memory,
        "bandwidth_gbps": card.bandwidth or None,
        "source": card.url,
        "fits": fits(wanted.total, card),
        "largest_context": largest_context(config, weights, batch, card),
        "bound_tokens_per_second": bound(config, weights, batch, context, card.bandwidth) if card.bandwidth else None,
        "measured_tokens_per_second": measured,
    }


def _show(model: str, config: GraniteConfig, found: dict[str, Any], context: int, batch: int, *, one: bool) -> None:
    from granite_kernels.model.cli_tables import console, table

    screen = console()
    screen.print(
        f"{model}: {config.parameters():,} parameters, {config.active_parameters():,} used by a token; "
        f"cache {found['cache_bytes_per_token'] / 1024:g} KiB a token; {context:,} tokens of context, batch {batch}",
        soft_wrap=True,
    )
    memory = table("format", "bits/weight", "file GB", "weights GB", "cache GB", "workspace GB", "total GB", "quality")
    for row in found["formats"]:
        sizes = (row[f"{kind}_bytes"] / 1e9 for kind in ("file", "weight", "cache", "workspace", "total"))
        memory.add_row(row["format"], f"{row['bits_per_weight']:.2f}", *(f"{size:.2f}" for size in sizes), row["quality"] or "not measured")
    screen.print(memory)
    screen.print(_one_card(found) if one else _all_cards(found))
    screen.print(GIVEN if one else NOTE, soft_wrap=True)


def _one_card(found: dict[str, Any]) -> Any:
    from granite_kernels.model.cli_tables import table

    card = found["formats"][0]["gpus"][0]
    title = f"{card['name']}: {card['memory_gb']:g} GB, {card['bandwidth_gbps']:,} GB/s" if card["bandwidth_gbps"] else card["name"]
    held = table("format", "fits", "longest context", "tokens/s at most", "measured", title=title)
    for row in found["formats"]:
        gpu = row["gpus"][0]
        speeds = (gpu["bound_tokens_per_second"], gpu["measured_tokens_per_second"])
        held.add_row(
            row["format"],
            "yes" if gpu["fits"] else "no",
            f"{gpu['largest_context']:,}" if gpu["largest_context"] else "-",
            *(f"{speed:,.0f}" if speed else "-" for speed in speeds),
        )
    return held


def _all_cards(found: dict[str, Any]) -> Any:
    from granite_kernels.model.cli_tables import table

    formats = found["formats"]
    held = table("GPU", "GB", "GB/s", *(row["format"] for row in formats), title="tokens/s at most, longest context")
    for index, card in enumerate(formats[0]["gpus"]):
        cells = (_cell(row["gpus"][index]) for row in formats)
        held.add_row(card["name"], f"{card['memory_gb']:g}", f"{card['bandwidth_gbps']:,}", *cells)
    return held


def _cell(gpu: dict[str, Any]) -> str:
    if not gpu["fits"]:
        longest = gpu["largest_context"]
        return f"no, {_thousands(longest)}" if longest else "-"
    measured = gpu["measured_tokens_per_second"]
    speed = f"{gpu['bound_tokens_per_second']:,.0f}" + (f" [{measured:,.0f}]" if measured else "")
    return f"{speed}, {_thousands(gpu['largest_context'])}"


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)
