"""Committed measurements, bench/results/*.json, as `plan` quotes them. Where the package is installed without them there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from granite_kernels.model.config import PRESETS, GraniteConfig

from granite_kernels.errors import GraniteError

from .gpus import find
from .plan import label

RESULTS = Path(__file__).parent / "results"
OURS = "granite-kernels"
GENERATION = "tg128"


def speeds(config: GraniteConfig, folder: Path = RESULTS) -> dict[tuple[str, str, int], float]:
    """(card, format, batch) -> our tokens/s with an empty cache before, for the preset that `config` is."""
    names = {name for name in PRESETS if GraniteConfig.preset(name) == config}
    found = {}
    for header, rows in _reports(folder):
        try:
            card = find(str(header.get("gpu"))).name
        except GraniteError:
            continue
        for row in rows:
            told = (row.get("kind"), row.get("implementation"), row.get("test"), row.get("status"), row.get("context"))
            if told == ("speed", OURS, GENERATION, "ok", 0) and str(row.get("model")).removeprefix("random:") in names:
                found[card, _label(row["format"]), row["batch"]] = float(row["tokens_per_second"])
    return found


def quality(folder: Path = RESULTS) -> dict[str, str]:
    """Format -> what was measured of it, in a few words, with the model that it was measured on."""
    found = {}
    for _, rows in _reports(folder):
        for row in rows:
            if row.get("kind") == "quality":
                found[_label(row["format"])] = f"KL {row['kl']:.2g}, top-1 {row['top1']:.1%} ({row['model']})"
    return found


def _label(format: str) -> str:
    return "F16" if format in ("bf16", "bfloat16", "f16", "float16") else label(format)


def _reports(folder: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    read = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return [(report["header"], report["rows"]) for report in read if isinstance(report, dict) and {"header", "rows"} <= report.keys()]
