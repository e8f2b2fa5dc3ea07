"""`make examine`: the decode steps of all models, formats and architectures examined; a table and the figures behind it are committed.

Both files are written after every cell. A run that was interrupted goes on where it stopped: a cell is kept as long as Triton and the
sources that it depends on are the same, comments and docstrings aside. Exits with status 1 where a limit is broken (`limits`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton
from granite_kernels.model import step

import granite_kernels

from .examine import Case, Report, examine, from_json
from .limits import broken
from .steps import UNQUANTIZED

RESULTS = Path(__file__).parents[1] / "results"
DENSE, EXPERTS = ("3.1-2b", "3.1-8b"), ("3.1-1b-a400m", "3.1-3b-a800m")
FORMATS = ("q4_k", "q8_0", "q6_k", "int4_g128", "q5_k")
ARCHITECTURES = (90, 80, 120, 86, 89, 100)  # what is most used first
Cell = tuple[Case, int]

# What dense matrices, and models without experts, don't run.
PACKED_FILES = {"decode.py", "packed.py", "scales.py", "tiles.py", "tiled.py", "rows.py"}
EXPERT_FILES = {"experts.py", "experts_operations.py", "grouped.py", "choice.py", "moe.py"}
PACKED_NAMES = {"_packed_launch", "DecodeLaunch", "decode_launch", "TiledLaunch", "tiled_launch"}
EXPERT_NAMES = {"experts_launch", "GroupedLaunch", "grouped_launch", "RouteLaunch", "route_launch"}


def matrix() -> list[Cell]:
    """Every cell, in the order in which they are examined: bfloat16 first, architecture by architecture."""
    dense = [Case(preset, UNQUANTIZED, batch) for preset in DENSE for batch in (1, 16, 4)]
    dense += [Case(preset, UNQUANTIZED, batch) for preset in EXPERTS for batch in (1, 16)]
    packed = [Case(preset, format, batch) for format in FORMATS for preset in (*DENSE, *EXPERTS) for batch in (1, 16)]
    return [(case, arch) for cases in (dense, packed) for arch in ARCHITECTURES for case in cases]


def examine_all(cells: Iterable[Cell] | None = None, folder: Path = RESULTS) -> list[Report]:
    """Examine each cell and write `offline.md` and `offline.json` in `folder`, with progress on stderr."""
    cells = list(dict.fromkeys(matrix() if cells is None else cells))
    done = known(folder / "offline.json")
    for case, arch in (cell for cell in cells if cell not in done):
        begun = time.perf_counter()
        done[case, arch] = report = examine(case, arch)
        write(done, folder)
        faults = "; ".join(broken(report)) or "within all limits"
        print(f"[{len(done)}] sm_{arch} {case}: {time.perf_counter() - begun:.0f} s, {faults}", file=sys.stderr, flush=True)
    write(done, folder)
    return [done[cell] for cell in cells]


class _WithoutTexts(ast.NodeTransformer):
    """Drops docstrings: what is said of the code doesn't change it."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


@functools.cache
def sources(quantization: str, preset: str) -> str:
    """A digest of all that decides what a cell's report says."""
    package, model, offline = Path(granite_kernels.__file__).parent, Path(step.__file__).parent, Path(__file__).parent
    files = [file for pattern in ("*.py", "kernels/*.py", "linear/*.py", "formats/*.py") for file in package.glob(pattern)]
    files += [model / name for name in ("granite.py", "step.py", "weights.py")]
    files += [file for file in offline.glob("*.py") if file.stem not in ("matrix", "limits", "tables", "cli")]
    skipped: set[str] = set()
    if quantization == UNQUANTIZED:
        files = [file for file in files if file.name not in PACKED_FILES and file.parent.name != "formats"]
        skipped |= PACKED_NAMES
    if preset in DENSE:
        files = [file for file in files if file.name not in EXPERT_FILES]
        skipped |= EXPERT_NAMES
    digest = hashlib.sha256()
    for file in sorted(files):
        tree = ast.parse(file.read_text())
        tree.body = [node for node in tree.body if getattr(node, "name", None) not in skipped]
        digest.update(ast.unparse(_WithoutTexts().visit(tree)).encode())
    return digest.hexdigest()[:16]


def known(file: Path) -> dict[Cell, Report]:
    """The cells in `file` that still hold."""
    records = json.loads(file.read_text()) if file.exists() else {}
    found = {}
    for record in records.get("reports", []):
        report = from_json(record)
        if record["sources"] == sources(report.case.quantization, report.case.preset) and report.triton == triton.__version__:
            found[report.case, report.arch] = report
    return found


def write(done: dict[Cell, Report], folder: Path) -> None:
    """Both files, in the order of the matrix."""
    from .tables import markdown

    folder.mkdir(parents=True, exist_ok=True)
    cells = matrix()
    ordered = [cell for cell in cells if cell in done] + [cell for cell in done if cell not in cells]
    records = []
    for case, arch in ordered:
        digest = {"sources": sources(case.quantization, case.preset)}
        records.append(json.dumps({**digest, **done[case, arch].to_json()}, separators=(",", ":")))
    lines = ",\n".join(records)
    (folder / "offline.json").write_text(f'{{"reports": [\n{lines}\n]}}\n')
    (folder / "offline.md").write_text(markdown([done[cell] for cell in ordered], len(set(cells) - done.keys())))


def main(archs: Sequence[str]) -> int:
    reports = examine_all([cell for cell in matrix() if not archs or str(cell[1]) in archs])
    faults = sum(len(broken(report)) for report in reports)
    print(f"{len(reports)} steps examined, {faults} limits broken", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
