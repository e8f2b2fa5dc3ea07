"""`doctor`: what of this machine the package can use."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from .model import GraniteForCausalLM

Row = tuple[str, bool, str]


NEEDED = {"torch": (2, 11), "triton": (3, 6), "transformers": (5,)}
OPTIONAL = "transformers"  # for the tests, and where one of its models meets ours
LONGEST = 300  # characters of a failure: compilers print whole programs
TRIED = (("3.1-2b", None), ("3.1-2b", "q4_k_m"), ("3.1-1b-a400m", None))  # between them every role, dense and packed


@click.command()
@click.option("--kernels/--no-kernels", default=True, help="Compile and run every kernel where there is a GPU: up to a minute.")
def doctor(kernels: bool) -> None:
    """GPU, driver, torch, triton, C compiler, caches; which kernels compile and run here."""
    from .cli_tables import console, table

    found = table("", "", "", header=False)
    for name, good, text in rows(kernels):
        found.add_row("ok" if good else "--", name, text)
    console().print(found)


def rows(kernels: bool = True) -> Iterator[Row]:
    """(what, whether it is fine, what was found); `kernels`: try them where there is a GPU."""
    yield "python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in NEEDED:
        yield _version(name)
    yield from _gpu()
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    yield "C compiler", compiler is not None, compiler or "none found: Triton needs one to start kernels; install gcc"
    for name, folder in _caches():
        yield name, _writable(folder), f"{folder}" + ("" if _writable(folder) else " can't be written")
    yield from _tried() if kernels and _has_gpu() else _chosen()


def _version(name: str) -> Row:
    if importlib.util.find_spec(name) is None:
        return name, name == OPTIONAL, "not installed" + (": it isn't needed" if name == OPTIONAL else "")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # triton is packaged under other names on some systems
        return name, True, "installed"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[: len(NEEDED[name])])
    needed = ".".join(map(str, NEEDED[name]))
    return name, numbers >= NEEDED[name], version + ("" if numbers >= NEEDED[name] else f": {needed} or newer is needed")


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


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= (8, 0)


def _chosen() -> Iterator[Row]:
    """Which operations would be taken, with none of them tried."""
    import torch

    from granite_kernels.ops import choose

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for choice in choose("auto", device, torch.bfloat16 if device.type == "cuda" else torch.float32).choices:
        yield f"kernel {choice.role}", choice.active, choice.kernel + (f" ({choice.reason})" if choice.reason else "")


def _tried() -> Iterator[Row]:
    """Every kernel compiled and run in one layer of real sizes."""
    from .config import GraniteConfig
    from .model import GraniteForCausalLM

    for preset, quantization in TRIED:
        config = dataclasses.replace(GraniteConfig.preset(preset), num_hidden_layers=1)
        model = GraniteForCausalLM.from_config(config, quantization=quantization)
        yield from verdicts(model, f"{preset} {quantization or 'bfloat16'}")


def verdicts(model: GraniteForCausalLM, label: str) -> Iterator[Row]:
    """A row for each role of `model`: what its kernel did when it was tried or, where it isn't Triton's, why."""
    from .trial import trial

    tried = {one.role: one for one in trial(model)}
    for choice in model.kernels():
        one = tried.get(choice.role)
        if choice.active and one is None:
            continue  # nothing in a request calls it
        if one is None:
            text = f"{choice.kernel} ({choice.reason})"
        elif one.error is None:
            text = f"{choice.kernel} runs, {one.seconds:.1f} s with compiling"
        else:
            text = f"{choice.kernel} fails: {one.error}"
        yield f"{label}: {choice.role}", one is not None and one.error is None, " ".join(text.split())[:LONGEST]
