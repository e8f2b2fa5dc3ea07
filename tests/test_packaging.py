"""What is installed, what importing costs, and what the type checker sees."""

from __future__ import annotations

import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = {"granite_kernels": "granite_kernels", "model": "granite_kernels/model", "bench": "granite_kernels/bench"}


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules() -> list[str]:
    """Every module of the package by its installed name, scripts that run themselves excepted."""
    found = []
    for folder, mapped in MAPPED.items():
        for file in (ROOT / folder).rglob("*.py"):
            name = (Path(mapped) / file.relative_to(ROOT / folder)).with_suffix("").as_posix().replace("/", ".")
            if not name.endswith("__main__"):
                found.append(name.removesuffix(".__init__"))
    return sorted(found)


def test_the_package_table_covers_every_folder() -> None:
    table = re.search(r"PACKAGES = \{(.*?)\}", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert table is not None
    listed = dict(re.findall(r'"([\w.]+)": "([\w/]+)"', table[1]))
    folders = {file.parent.relative_to(ROOT).as_posix() for folder in MAPPED for file in (ROOT / folder).rglob("__init__.py")}
    assert set(listed.values()) == folders


@pytest.mark.slow
def test_a_wheel_has_one_top_level_package_with_everything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"granite_kernels"}
    expected = {
        f"{mapped}/{Path(name).relative_to(folder).as_posix()}"
        for folder, mapped in MAPPED.items()
        for name in tracked
        if name.startswith(f"{folder}/") and name.endswith(".py")
    }
    assert expected <= set(names)


def test_importing_the_package_imports_no_torch_and_costs_little() -> None:
    code = "import sys, time; t = time.perf_counter(); import granite_kernels; print(time.perf_counter() - t, 'torch' in sys.modules)"
    results = [python(code).split() for _ in range(3)]
    assert {torch for _, torch in results} == {"False"}
    assert statistics.median(float(seconds) for seconds, _ in results) < 0.2


def test_help_answers_at_once_without_torch() -> None:
    code = """
import runpy, sys
sys.argv = ["granite-kernels", "--help"]
try:
    runpy.run_module("granite_kernels", run_name="__main__")
except SystemExit:
    print("torch" in sys.modules)
"""
    assert python(code).splitlines()[-1] == "False"
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "granite_kernels", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - begun)
    assert statistics.median(times) < 0.5


@pytest.mark.parametrize("seed", [1, 2])
def test_submodules_in_any_order_ask_for_no_device_and_leave_every_public_name_what_it_is(seed: int) -> None:
    order = modules()
    random.Random(seed).shuffle(order)
    code = f"""
import importlib, types
import torch

def asked(*_, **__):
    raise AssertionError("a device was asked for")

# on a machine without a GPU a query would go unnoticed
for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_capability", "get_device_properties"):
    assert hasattr(torch.cuda, name)
    setattr(torch.cuda, name, asked)
for name in {order!r}:
    importlib.import_module(name)
import granite_kernels
from granite_kernels.model.model import GraniteForCausalLM
from granite_kernels.model.config import GraniteConfig
from granite_kernels.model.tool_calls import parse_tool_calls
from granite_kernels.errors import GraniteError
for value in (GraniteForCausalLM, GraniteConfig, parse_tool_calls, GraniteError):
    assert getattr(granite_kernels, value.__name__) is value, value
assert all(hasattr(granite_kernels, name) for name in granite_kernels.__all__)
assert not any(isinstance(getattr(granite_kernels, name), types.ModuleType) for name in granite_kernels.__all__)
assert not torch.cuda.is_initialized()
"""
    python(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import granite_kernels

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = granite_kernels.nonsense


def test_no_tracked_text_names_a_machine() -> None:
    found = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^A-Za-z0-9_.])/(work|root|home/[a-z]+)/", "--", ".", ":!tests/test_packaging.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""


@pytest.mark.slow
def test_types_are_checked_across_the_mapping(tmp_path: Path) -> None:
    for name in ("granite_kernels", "model", "bench", "Makefile", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    file = tmp_path / "model" / "memory.py"
    file.write_text(file.read_text() + "\n\nfrom granite_kernels.launch import Target\n\nPLANTED = Target(arch='ninety', sms=1)\n")
    subprocess.run(["make", "--quiet", "tree"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "mypy", "-m", "granite_kernels.model.memory", "--cache-dir", str(ROOT / ".mypy_cache")]
    environment = {"MYPYPATH": "build/tree", "PATH": "/usr/bin:/bin"}
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert 'incompatible type "str"; expected "int"' in checked.stdout, checked.stdout + checked.stderr


def test_make_gpu_finds_the_package_where_nothing_was_installed(tmp_path: Path) -> None:
    for name in MAPPED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    probe = tmp_path / "tests" / "gpu" / "test_probe.py"
    probe.parent.mkdir(parents=True)
    probe.write_text(f"""
import subprocess, sys
import granite_kernels
from granite_kernels.model.progress import loading_bar

def test_probe():
    assert granite_kernels.__file__.startswith({str(tmp_path)!r})
    assert granite_kernels.__version__ == "0+unknown"
    subprocess.run([sys.executable, "-S", "-c", "import granite_kernels.model.progress"], check=True)
""")
    # -S: without the .pth file of an editable install; what else is installed comes by PYTHONPATH, which `make gpu` must keep
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "granite_kernels" not in entry.name:
            (libraries / entry.name).symlink_to(entry)
    environment = {**os.environ, "PYTHONPATH": str(libraries)}
    command = ["make", "gpu", f"PYTHON={sys.executable} -S"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
