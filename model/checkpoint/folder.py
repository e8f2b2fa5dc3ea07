"""A folder of safetensors: which files hold the weights, and what its JSON says.

An index is input from strangers. It may only name files of its own folder, ending in .safetensors; links out of the
folder are refused, except those of a hub cache, whose snapshots link into the blobs two levels up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from granite_kernels.errors import GraniteError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
LARGEST_JSON = 1 << 26  # bytes; the index of a model of 400 layers has 0.1 MB

Shards = dict[Path, frozenset[str] | None]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises GraniteError for anything else."""
    if not path.is_file():
        raise GraniteError(f"{path}: no such file; expected a JSON object, so download the checkpoint again")
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise GraniteError(f"{path}: has {size:,} bytes; expected JSON of at most {LARGEST_JSON:,}")
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, or a number of 5,000 digits
        if isinstance(error, GraniteError):
            raise
        raise GraniteError(f"{path} ({size:,} bytes): not valid JSON ({error}); download the file again") from error
    except OSError as error:
        raise GraniteError(f"{path}: can't be read: {error.strerror}; check its permissions") from error
    if not isinstance(content, dict):
        raise GraniteError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


def find_shards(folder: Path) -> Shards:
    """The files that hold the weights, each with the names that the index gives it (None where there is no index)."""
    if (folder / WEIGHTS).exists():
        return {_own_file(folder, WEIGHTS, folder): None}
    index = folder / INDEX
    if index.exists():
        return _indexed(folder, index)
    names = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return {_own_file(folder, found[0], folder): None}
    if found:
        raise GraniteError(f"{folder}: holds {len(found)} .safetensors files and no {INDEX}; download the index too")
    for kinds, advice in (
        (PICKLES, "convert them to safetensors (pickled files can run code and are never opened)"),
        ((".gguf",), "give the path of one .gguf file instead of the folder"),
    ):
        others = [name for name in names if name.endswith(kinds)]
        if others:
            raise GraniteError(f"{folder}: holds {', '.join(others[:3])} and no .safetensors; {advice}")
    raise GraniteError(f"{folder}: holds no weights; expected {CONFIG} and {WEIGHTS}, or {INDEX} and its shards")


def _indexed(folder: Path, index: Path) -> Shards:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GraniteError(f"{index}: weight_map is {str(weight_map)[:40]}; expected an object from tensor names to file names")
    listed: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _plain(file) or not tensor.isprintable():
            raise GraniteError(
                f"{index}: {tensor[:200]!r} is said to be in {str(file)[:200]!r}; "
                "expected the name of a .safetensors file in the same folder"
            )
        listed.setdefault(file, set()).add(tensor)
    missing = sorted(file for file in listed if not (folder / file).exists())
    if missing:
        raise GraniteError(f"{index}: names files that aren't there: {', '.join(missing)}; download the checkpoint again")
    return {_own_file(folder, file, index): frozenset(tensors) for file, tensors in sorted(listed.items())}


def _plain(file: str) -> bool:
    return file.endswith(".safetensors") and not any(character in file for character in "/\\\0:")


def _own_file(folder: Path, name: str, named_by: Path) -> Path:
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise GraniteError(f"{path}: can't be followed ({error}); download the checkpoint again") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in allowed):
        raise GraniteError(f"{named_by}: {name} is a link to {real}; expected a file in the folder, so copy it there")
    if not real.is_file():
        raise GraniteError(f"{path}: not a regular file; expected a .safetensors file")
    return path
