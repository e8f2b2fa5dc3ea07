"""`inspect`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import collections
import json
import math
from typing import TYPE_CHECKING, Any

import click

from granite_kernels.errors import GraniteError

from .sources import RANDOM, resolve

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def inspect(model: str, tensors: bool, as_json: bool) -> None:
    """Configuration, tensors, types and bits per weight of MODEL. No weights are loaded."""
    from .checkpoint import open_checkpoint

    if model.startswith(RANDOM):
        raise GraniteError("random weights have no checkpoint to inspect")
    with open_checkpoint(resolve(model)) as checkpoint:
        found = summary(checkpoint)
    if as_json:
        click.echo(json.dumps(found))
        return
    from .cli_tables import console, table

    screen = console()
    screen.print(f"{found['path']}  ({found['kind']})", soft_wrap=True)
    settings = table("field", "value", title="configuration")
    for name, value in found["config"].items():
        settings.add_row(name, str(value))
    screen.print(settings)
    types = table("type", "tensors", "weights", "bytes", title="types")
    for name, row in found["types"].items():
        types.add_row(name, str(row["tensors"]), f"{row['weights']:,}", f"{row['bytes']:,}")
    screen.print(types)
    if tensors:
        listing = table("tensor", "shape", "type", "bytes", title="tensors")
        for row in found["tensors"]:
            listing.add_row(row["name"], "x".join(map(str, row["shape"])), row["type"], f"{row['bytes']:,}")
        screen.print(listing)
    screen.print(f"{found['parameters']:,} parameters, {found['bytes']:,} bytes, {found['bits_per_weight']:.2f} bits per weight")
    if found["active_bytes"] < found["bytes"]:
        screen.print(f"{found['active_parameters']:,} parameters, {found['active_bytes']:,} bytes read by a token")


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that `inspect` shows, as plain JSON data."""
    from .checkpoint.layout import EMBEDDING

    types: dict[str, collections.Counter[str]] = {}
    rows = []
    for info in checkpoint.tensors.values():
        weights = math.prod(info.shape)
        types.setdefault(info.format, collections.Counter()).update(tensors=1, weights=weights, bytes=info.nbytes)
        rows.append({"name": info.name, "shape": list(info.shape), "type": info.format, "bytes": info.nbytes})
    parameters = sum(row["weights"] for row in types.values())
    config = checkpoint.config
    active: collections.Counter[str] = collections.Counter()
    for info in checkpoint.tensors.values():
        share = 1.0
        if len(info.shape) == 3:
            share = config.num_experts_per_tok / config.num_local_experts
        elif info.name == EMBEDDING and not config.tie_word_embeddings:
            share = 1 / config.vocab_size
        active.update(weights=round(math.prod(info.shape) * share), bytes=round(info.nbytes * share))
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "config": config.to_dict(),
        "types": {name: dict(row) for name, row in sorted(types.items())},
        "tensors": rows,
        "parameters": parameters,
        "bytes": checkpoint.nbytes,
        "bits_per_weight": 8 * checkpoint.nbytes / parameters,
        "active_parameters": active["weights"],
        "active_bytes": active["bytes"],
    }
