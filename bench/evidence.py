"""Committed measurements, bench/results/*.json, as `plan` quotes them. Where the package is installed without them there are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from granite_kernels.model.config import PRESETS, GraniteConfig

from granite_kernels.errors import GraniteError

from .gpus import find
from .harness import OURS
from .plan import label
from .rows import OK, Row

RESULTS = Path(__file__).parent / "results"
GENERATION = "tg128"
MODELS = {"demo": "SmolLM2-135M"}
DENSE = {"bfloat16": "F16", "float16": "F16", "float32": "F32"}


def speeds(config: GraniteConfig, folder: Path = RESULTS) -> dict[tuple[str, str, int], float]:
    """(card, format, batch) -> our tokens/s from an empty cache on, for the preset that `config` is."""
    names = {name for name in PRESETS if GraniteConfig.preset(name) == config}
    found = {}
    for header, rows in _reports(folder):
        try:
            card = find(str(header.get("device"))).name
        except GraniteError:
            continue
        for row in rows:
            told = (row["kind"], row.get("implementation"), row.get("test"), row.get("status"), row.get("context"))
            if told == ("speed", OURS, GENERATION, OK, 0) and row["model"].removeprefix("random:") in names:
                found[card, _label(row["format"]), row["batch"]] = float(row["tokens_per_second"])
    return found


def quality(folder: Path = RESULTS) -> dict[str, str]:
    """Format -> what was measured of it, in a few words, with the model that it was measured on and the bits that it took there."""
    return {
        _label(
            row["format"]
        ): f"KL {row['kl']:.2g}, top-1 {row['top1']:.1%} ({MODELS.get(row['model'], row['model'])}, {row['bits_per_weight']:.2f} bits)"
        for _, rows in _reports(folder)
        for row in rows
        if row["kind"] == "quality"
    }


def _label(format: str) -> str:
    return DENSE.get(format) or label(format)


def _reports(folder: Path) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """Of every file that is a report: other evidence lies in the folder, too."""
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if isinstance(report, dict) and {"header", "rows"} <= report.keys():
            yield report["header"], report["rows"]
