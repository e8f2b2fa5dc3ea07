"""Tables of the verbs: drawn on a terminal; anywhere else plain, one row a line, with nothing cut."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 1000  # columns: a pipe has no width of its own, and rich would cut at 80


def console() -> Console:
    """Where the verbs print; colours as NO_COLOR and the terminal allow."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def table(*columns: str, title: str | None = None, header: bool = True) -> Table:
    """An empty table of text cells."""
    from rich import box
    from rich.table import Table

    drawn = box.HEAVY_HEAD if header and sys.stdout.isatty() else None
    return Table(*columns, title=title, title_justify="left", show_header=header, box=drawn)
