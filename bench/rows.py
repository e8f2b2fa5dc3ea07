"""What a benchmark leaves: a header and flat rows, written to a file as each row comes, so that Ctrl-C or a crash loses nothing.

    {"header": {...}, "rows": [{"kind": "kernel", "op": "linear", ..., "status": "ok", "median_us": 21.3, ...}, ...]}

Kinds: "roof" (what the device was measured to do), "kernel", "speed" (tokens/s end to end), "startup" and "modelled" (computed without
the device it speaks of). A row whose status isn't "ok" says in `note` why it has no figures: absent, refused, error, left out.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from granite_kernels.errors import GraniteError

Row = dict[str, Any]
OK, ABSENT, REFUSED, ERROR, LEFT_OUT = "ok", "absent", "refused", "error", "left out"
# what tells rows of a kind apart; all else in a row was measured
KEYS = {
    "roof": ("what",),
    "kernel": ("op", "size", "tokens", "format", "dtype", "implementation"),
    "speed": ("model", "implementation", "format", "test", "batch", "context"),
    "startup": ("model", "implementation", "format", "cache"),
    "modelled": ("model", "format", "card", "launch"),
    "quality": ("model", "format"),
}


def key(row: Row) -> tuple[Any, ...]:
    """What a row is about: equal for the same measurement in two reports."""
    return (row["kind"], *(row.get(name) for name in KEYS[row["kind"]]))


class Recorder:
    """Collects the rows of a run and keeps its file up to date. `path` None: in memory only; `show` sees each row as it comes; `rows`
    are there already.
    """

    def __init__(
        self, header: dict[str, Any], path: Path | None = None, show: Callable[[Row], None] | None = None, rows: Iterable[Row] = ()
    ) -> None:
        self.header, self.path, self.show = header, path, show
        self.rows: list[Row] = list(rows)
        self._write()

    def add(self, row: Row) -> None:
        """Keep a row; one about the same as an earlier one takes its place, unless it alone has no figures."""
        earlier = next((i for i, other in enumerate(self.rows) if key(other) == key(row)), None)
        if earlier is None:
            self.rows.append(row)
        elif row["status"] == OK or self.rows[earlier]["status"] != OK:
            self.rows[earlier] = row
        self._write()
        if self.show is not None:
            self.show(row)

    def take(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.add(row)

    def tell(self, **facts: Any) -> None:
        """Add to the header what is known only now."""
        self.header |= facts
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            save(self.path, self.header, self.rows)


def save(path: Path, header: dict[str, Any], rows: list[Row]) -> None:
    """Write a report, a row a line; the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    partial = path.with_name(path.name + ".part")
    partial.write_text(f'{{"header": {json.dumps(header, indent=1)},\n"rows": [\n{lines}\n]}}\n')
    os.replace(partial, path)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The header and the rows of a report. Raises GraniteError for a file that isn't one."""
    try:
        report = json.loads(path.read_text())
        header, rows = report["header"], report["rows"]
        for row in rows:
            key(row)
    except FileNotFoundError as error:
        raise GraniteError(f"{path}: there is no such file; `granite-kernels bench MODEL --json FILE` writes one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise GraniteError(f"{path}: expected a benchmark report, an object with header and rows; write one with --json") from error
    return header, rows


def to_csv(rows: Iterable[Row]) -> str:
    """All rows as CSV: the union of their fields, in the order in which they first occur."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
