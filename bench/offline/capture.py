"""Launch capture without a GPU: wrappers run, their kernels are compiled for a target and recorded instead of launched.

    with capture(90) as launches:
        rms_norm(torch.empty(1, 2048, dtype=torch.bfloat16), torch.empty(2048, dtype=torch.bfloat16), eps=1e-5)
    launches[0].registers, launches[0].grid, launches[0].ptx

Triton specialises and compiles exactly as on the GPU (its own `JITFunction.run`, the same alignment of pointers and
integers); only the driver is a stub. Give it **CPU tensors from `torch.empty`**: their memory is reserved and never
touched, so the real sizes cost nothing; `.is_cuda` says True inside the context; and torch operations made by
`torch.library.custom_op` reach their implementation, while tensors on `meta` or in a FakeTensorMode would stop at the
fake one and launch nothing (plain wrappers take them). `.device` still says cpu: a wrapper must not branch on it.
Results are whatever the memory held, so control flow must not depend on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver as triton_driver

from .cards import ARCHITECTURES, cards_of

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # cuobjdump, nvdisasm: part of the Triton wheel
HERE = str(Path(__file__).parent)
TRITON = str(Path(triton.__file__).parent)


@dataclasses.dataclass(frozen=True)
class TensorArgument:
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """One captured launch. `spill_bytes` is stack and local memory a thread; `new` is false where the capture held the
    same compiled kernel already; `arguments` are tensors by name (`planes.0` for a member of a tuple) and scalars."""

    name: str
    arch: int
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared: int
    constexprs: dict[str, Any]
    signature: dict[str, str]
    divisible: tuple[str, ...]
    arguments: dict[str, Any]
    site: str
    hash: str
    new: bool
    pdl: bool
    asm: dict[str, Any] = dataclasses.field(repr=False)

    @property
    def cubin(self) -> bytes:
        cubin: bytes = self.asm["cubin"]
        return cubin

    @property
    def ptx(self) -> str:
        ptx: str = self.asm["ptx"]
        return ptx

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def bytes_of(self, *names: str) -> int:
        """Total size of the tensor arguments of these names (`planes` means all members of a tuple, `planes.0` one; no
        name means all arguments)."""
        tensors = {name: value.bytes for name, value in self.arguments.items() if isinstance(value, TensorArgument)}
        return sum(size for name, size in tensors.items() if not names or name in names or name.split(".")[0] in names)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL as the compiler wrote them into the code object."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


class _Driver:
    """All that `triton.runtime` asks of a driver. The device number is the architecture: one kernel cache for each."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[Launch] = []
        self.kernel: Any = None
        self.utils = SimpleNamespace(
            get_device_properties=self._properties, load_binary=self._load_binary, unload_module=lambda module: None
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: Any, packed: Any, extra: Any, enter: Any, leave: Any, *args: Any) -> None:
            # the active driver, not this one: Triton keeps the launcher with its compiled kernel beyond this capture
            triton_driver.active.record(source, metadata, (x, y, z), args)

        return launch

    def record(self, source: Any, metadata: Any, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        names = source.fn.arg_names
        attributes = {names[path[0]]: value for path, value in source.attrs.items() if len(path) == 1}
        kernel = self.kernel
        self.launches.append(
            Launch(
                name=source.fn.__name__,
                arch=metadata.target.arch,
                grid=grid,
                num_warps=metadata.num_warps,
                num_stages=metadata.num_stages,
                registers=kernel.n_regs,
                spill_bytes=kernel.n_spills,
                shared=metadata.shared,
                constexprs={names[path[0]]: value for path, value in source.constants.items() if len(path) == 1},
                signature=dict(source.signature),
                divisible=tuple(name for name, value in attributes.items() if any("divisib" in str(part) for part in value)),
                arguments=dict(_describe(names, args)),
                site=_call_site(),
                hash=kernel.hash,
                new=all(kernel.hash != launch.hash for launch in self.launches),
                pdl=bool(getattr(metadata, "launch_pdl", False)),
                asm=kernel.asm,
            )
        )

    def _properties(self, device: int) -> dict[str, int]:
        limits, card = ARCHITECTURES[self.arch], cards_of(self.arch)[0]
        return {
            "max_shared_mem": limits.shared_per_block,
            "multiprocessor_count": card.sms,
            "max_num_regs": limits.registers_per_sm,
            "warpSize": 32,
            "sm_clock_rate": int(card.clock * 1e6),
            "mem_clock_rate": 1_000_000,
            "mem_bus_width": 5120,
        }

    def _load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        usage = resource_usage(cubin)
        return object(), object(), usage.get("REG", 0), usage.get("STACK", 0) + usage.get("LOCAL", 0), 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return "void*"

    def is_active(self) -> bool:
        return True

    def allocate_default_profile_scratch(self, *args: Any) -> None:
        return None


def _describe(names: list[str], args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for name, value in zip(names, args, strict=False):
        value = getattr(value, "base", value)  # of a TensorDescriptor or TensorWrapper
        if isinstance(value, tuple):
            yield from _describe([f"{name}.{position}" for position in range(len(value))], value)
        elif isinstance(value, torch.Tensor):
            yield name, TensorArgument(str(value.dtype).removeprefix("torch."), tuple(value.shape), value.numel() * value.element_size())
        else:
            yield name, value


def _call_site() -> str:
    """File and line that launched the kernel: the last frame outside Triton and this package."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((HERE, TRITON)):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "?"


def _stub_cuda(arch: int, replace: Callable[[Any, str, Any], None]) -> None:
    """torch.cuda as on a machine with the first card of this architecture."""
    card, limits = cards_of(arch)[0], ARCHITECTURES[arch]
    major, minor = divmod(arch, 10)
    properties = SimpleNamespace(
        name=f"{card.name} (stub)",
        major=major,
        minor=minor,
        multi_processor_count=card.sms,
        L2_cache_size=50 << 20,
        total_memory=80 << 30,
        warp_size=32,
        regs_per_multiprocessor=limits.registers_per_sm,
        shared_memory_per_block_optin=limits.shared_per_block,
        max_threads_per_multi_processor=limits.warps_per_sm * 32,
    )
    replace(torch.Tensor, "is_cuda", property(lambda tensor: True))
    replace(torch.cuda, "is_available", lambda: True)
    replace(torch.cuda, "device_count", lambda: 1)
    replace(torch.cuda, "current_device", lambda: 0)
    replace(torch.cuda, "device", lambda *args, **kwargs: contextlib.nullcontext())
    replace(torch.cuda, "current_stream", lambda *args: SimpleNamespace(cuda_stream=0))
    replace(torch.cuda, "get_device_capability", lambda *args: (major, minor))
    replace(torch.cuda, "get_device_properties", lambda *args: properties)


@contextlib.contextmanager
def capture(arch: int = 90) -> Iterator[list[Launch]]:
    """Launches inside the context are compiled for `arch` (80, 86, 89, 90, 100, 120) and appended to the list it gives.

    Raises what the compiler raises (`triton.OutOfResources` where a launch needs more shared memory than the architecture
    has), and RuntimeError in a process whose kernels are interpreted.
    """
    cards_of(arch)
    if triton.knobs.runtime.interpret:
        raise RuntimeError("capture compiles: TRITON_INTERPRET must be unset or 0 before triton is imported (see offline.compiled)")
    driver = _Driver(arch)
    saved: list[tuple[Any, str, Any]] = []
    absent = object()

    def replace(owner: Any, name: str, value: Any) -> None:
        saved.append((owner, name, vars(owner).get(name, absent)))
        setattr(owner, name, value)

    run = CompiledKernel.run

    def remember(kernel: Any) -> Any:
        triton_driver.active.kernel = kernel
        return run.fget(kernel)

    before = triton_driver._active, triton_driver._default
    triton_driver.set_active(driver)
    try:
        replace(CompiledKernel, "run", property(remember))
        _stub_cuda(arch, replace)
        yield driver.launches
    finally:
        for owner, name, value in reversed(saved):
            delattr(owner, name) if value is absent else setattr(owner, name, value)
        triton_driver._active, triton_driver._default = before
