"""`doctor`: what of this machine the package can use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

Row = tuple[str, bool, str]


@click.command()
def doctor() -> None:
    """GPU, driver, torch, triton, C compiler, caches; which kernels run here."""
    from .cli_tables import console, table

    found = table("", "", "", header=False)
    for name, good, text in rows():
        found.add_row("ok" if good else "--", name, text)
    console().print(found)


def rows() -> Iterator[Row]:
    """(what, whether it is fine, what was found)"""
    yield "python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in ("torch", "triton", "transformers"):
        yield _version(name)
    yield from _gpu()
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    yield "C compiler", compiler is not None, compiler or "none found: Triton needs one to start kernels; install gcc"
    for name, folder in _caches():
        yield name, _writable(folder), f"{folder}" + ("" if _writable(folder) else " can't be written")
    yield from _kernels()


def _version(name: str) -> Row:
    if importlib.util.find_spec(name) is None:
        return name, False, "not installed"
    try:
        return name, True, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # triton is packaged under other names on some systems
        return name, True, "installed"


def _gpu() -> Iterator[Row]:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        yield "GPU", False, f"none that torch ({built}) sees: models run on the CPU in plain PyTorch"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        fits = properties.major >= 8
        text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        yield f"cuda:{index}", fits, text + ("" if fits else ": kernels need 8.0 or newer")
    yield _driver()


def _driver() -> Row:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "driver", False, "nvidia-smi, which comes with the driver and tells its version, doesn't answer"
    return "driver", bool(told), told[0] if told else "nvidia-smi tells no version"


def _caches() -> Iterator[tuple[str, Path]]:
    home = Path.home()
    yield "kernel cache", Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))
    yield "hub cache", Path(os.environ.get("HF_HUB_CACHE", Path(os.environ.get("HF_HOME", home / ".cache" / "huggingface")) / "hub"))


def _writable(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False


def _kernels() -> Iterator[Row]:
    import torch

    from granite_kernels.ops import choose

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for choice in choose("auto", device, torch.bfloat16 if device.type == "cuda" else torch.float32).choices:
        yield f"kernel {choice.role}", choice.active, choice.kernel + (f" ({choice.reason})" if choice.reason else "")
