"""Progress bars: on a terminal, and nowhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def loading_bar(total: int, what: str = "loading") -> Iterator[Callable[[str], None]]:
    """A bar over `total` tensors; call it with the name of each."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="tensor", leave=False, disable=not sys.stderr.isatty()) as bar:

        def advance(name: str) -> None:
            bar.update()

        yield advance
