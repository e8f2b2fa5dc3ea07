"""From what the user names to a file or folder on this machine: a path, else a hub id, in the cache or downloaded.

Only configuration, tokenizer and safetensors are ever downloaded. A complete snapshot in the cache is used without
asking the network; huggingface_hub's own variables (HF_HUB_OFFLINE, HF_HOME, HF_TOKEN) mean what they mean there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from granite_kernels.errors import GraniteError

from .folder import CONFIG, PICKLES, find_shards

WANTED = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
UNWANTED = ["*/*"]  # folders inside a repository hold other formats of the same weights
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """A file, a folder, a snapshot in the hub's cache, or one downloaded now, tried in this order."""
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise GraniteError(f"the source is {source!r}; expected a .gguf file, a folder or a hub id such as owner/name")
    text = os.fspath(source)
    try:
        path = Path(text).expanduser()
        if path.is_file() or path.is_dir():
            return path
        if path.exists():
            raise GraniteError(f"{path}: neither a file nor a folder; expected a .gguf file or a folder with {CONFIG}")
    except (OSError, RuntimeError) as error:  # too long a name, no permission, no such user
        raise GraniteError(f"{text[:200]}: can't be opened as a path: {error}; expected a file, a folder or a hub id") from error
    if not isinstance(source, str) or not _is_hub_id(text):
        raise GraniteError(f"{text}: no such file or folder, and not a hub id such as owner/name; check the spelling")
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    return _cached(text, where) or _download(text, where, local_files_only)


def _is_hub_id(text: str) -> bool:
    ours = text.endswith((".gguf", ".safetensors", *PICKLES))
    return _HUB_ID.fullmatch(text) is not None and not ours and not text.startswith(".")


def _cached(repo: str, where: dict[str, Any]) -> Path | None:
    try:
        folder = _snapshot(repo, where, local_files_only=True)
        find_shards(folder)
    except (OSError, ValueError):  # not there, or only in part; GraniteError is a ValueError
        return None
    return folder if (folder / CONFIG).is_file() else None


def _download(repo: str, where: dict[str, Any], local_files_only: bool) -> Path:
    from huggingface_hub import constants, errors

    revision = where["revision"] or "main"
    try:
        return _snapshot(repo, where, local_files_only=local_files_only)
    except errors.GatedRepoError as error:
        raise GraniteError(f"{repo}: access is restricted; accept its terms on the hub and pass token=") from error
    except errors.RepositoryNotFoundError as error:
        raise GraniteError(
            f"{repo}: no such file or folder here, and no such repository on the hub; check the spelling, or pass token= if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise GraniteError(f"{repo}: has no revision {revision!r}; use a branch, a tag or a commit of it") from error
    except Exception as error:  # whatever the HTTP library of the day raises: the message is the same
        offline = local_files_only or constants.HF_HUB_OFFLINE
        if offline:
            reason = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
            advice = f"{reason} forbids downloading it; download it first, or allow it"
        else:
            advice = f"it can't be downloaded ({_first_line(error)}); check the network, or give a local path"
        cache = where["cache_dir"] or constants.HF_HUB_CACHE
        raise GraniteError(
            f"{repo}: no such file or folder here, not complete in the cache {cache} at revision {revision}, and {advice}"
        ) from error


def _snapshot(repo: str, where: dict[str, Any], *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=local_files_only, **where))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
