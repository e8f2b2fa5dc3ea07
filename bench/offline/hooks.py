"""The tracer's hooks in Triton's interpreter: each memory operation, each program, each launch; taken out again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from .races import Access

Handle = stock.TensorHandle
Builder = stock.InterpreterBuilder
SHAPE_OPERATIONS = ["create_splat", "create_broadcast", "create_expand_dims", "create_reshape", "create_trans", "create_unsplat"]
SEVERAL = -1  # the owner of a block of pointers into more than one argument
EVICT_FIRST = stock._ir.EVICTION_POLICY.EVICT_FIRST


class Observer(Protocol):
    """What `traffic.Tracer` offers to the hooks."""

    def begin(self, name: str, arguments: list[tuple[str, Any]]) -> None: ...
    def end(self) -> None: ...
    def sequence(self, grid: tuple[int, int, int]) -> np.ndarray: ...
    def program(self, number: int) -> None: ...
    def access(self, kind: Access, pointers: Any, mask: np.ndarray, values: np.ndarray | None = None, streamed: bool = False) -> None: ...
    def synchronize(self, pointers: np.ndarray, mask: np.ndarray, semantics: str) -> None: ...
    def barrier(self) -> None: ...
    def dot(self, flops: int) -> None: ...
    def owner(self, address: int) -> int | None: ...
    def take_error(self) -> Exception | None: ...


def _mask(mask: Any, pointers: Any) -> np.ndarray:
    if mask is None:
        return np.ones(pointers.data.shape, bool)
    return np.broadcast_to(mask if isinstance(mask, np.ndarray) else mask.data, pointers.data.shape)


def _memory(observer: Observer) -> dict[str, Any]:
    load, store, dot, barrier = Builder.create_masked_load, Builder.create_masked_store, Builder.create_dot, Builder.create_barrier
    rmw, cas = Builder.create_atomic_rmw, Builder.create_atomic_cas

    def get_cache_policy(self: Any, modifier: Any, eviction: Any) -> Any:  # 3.9 joins the two in one operand of the load
        return EVICT_FIRST if "evict_first" in str(eviction).lower() else None

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        lanes = _mask(mask, pointers)
        streamed = EVICT_FIRST in rest or EVICT_FIRST in options.values()
        observer.access("read", pointers, lanes, streamed=streamed)
        return load(self, pointers, Handle(np.ascontiguousarray(lanes), tl.int1), *rest, **options)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        lanes = _mask(mask, pointers)
        observer.access("write", pointers, lanes, np.broadcast_to(value.data, pointers.data.shape)[lanes])
        return store(self, pointers, value, Handle(np.ascontiguousarray(lanes), tl.int1), *rest, **options)

    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        lanes = _mask(mask, pointers)
        observer.access("atomic", pointers, lanes)
        observer.synchronize(pointers.data, lanes, str(sem).lower())
        return rmw(self, operation, pointers, value, mask, sem, scope)

    def create_atomic_cas(self: Any, pointers: Any, compare: Any, value: Any, sem: Any, scope: Any) -> Any:
        lanes = _mask(None, pointers)
        observer.access("atomic", pointers, lanes)
        observer.synchronize(pointers.data, lanes, str(sem).lower())
        return cas(self, pointers, compare, value, sem, scope)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        observer.dot(2 * int(np.prod(a.data.shape)) * b.data.shape[-1])
        return dot(self, a, b, *rest)

    def create_barrier(self: Any, *rest: Any) -> Any:
        observer.barrier()
        return barrier(self, *rest)

    functions = [create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas, create_dot, create_barrier]
    if hasattr(Builder, "get_cache_policy"):
        functions.append(get_cache_policy)
    return {function.__name__: function for function in functions}


def _ownership(observer: Observer) -> dict[str, Any]:
    """A pointer remembers the argument that it was made from, so that straying into another argument is seen too."""
    add, choose = Builder.create_addptr, Builder.create_select

    def owner_of(pointer: Any) -> int | None:
        if "owner" in pointer.attr or not pointer.data.size:
            return pointer.attr.get("owner")
        return observer.owner(int(pointer.data.reshape(-1)[0]))

    def own(result: Any, owner: int | None) -> Any:
        if owner is not None:
            result.attr["owner"] = owner
        return result

    def create_addptr(self: Any, pointer: Any, offset: Any) -> Any:
        return own(add(self, pointer, offset), owner_of(pointer))

    def create_select(self: Any, condition: Any, first: Any, second: Any) -> Any:
        result = choose(self, condition, first, second)
        if not first.dtype.scalar.is_ptr():
            return result
        owners = {owner_of(first) if chosen else owner_of(second) for chosen in np.unique(condition.data)}
        return own(result, owners.pop() if len(owners) == 1 else SEVERAL)

    def keeping(original: Any) -> Any:
        def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            source = next((arg for arg in args if isinstance(arg, Handle)), None)
            return result if source is None else own(result, source.attr.get("owner"))

        return operation

    present = [name for name in SHAPE_OPERATIONS if hasattr(Builder, name)]
    kept = {name: keeping(getattr(Builder, name)) for name in present}
    return {"create_addptr": create_addptr, "create_select": create_select, **kept}


def _grid(observer: Observer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Launches and programs. The interpreter is given a flat grid, which is mapped to the programs to run, in their order."""
    set_index, prepare, call = Builder.set_grid_idx, stock.GridExecutor._init_args_hst, stock.GridExecutor.__call__
    launch: dict[str, Any] = {}

    def set_grid_dim(self: Any, x: int, y: int, z: int) -> None:
        self.grid_dim = launch["grid"]

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        number = int(launch["sequence"][x])
        _, rows, columns = self.grid_dim
        observer.program(number)
        set_index(self, number // (rows * columns), number // columns % rows, number % columns)

    def prepare_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        result = prepare(self, args, kwargs)
        observer.begin(self.fn.__name__, [*zip(self.arg_names, result[0], strict=False), *result[1].items()])
        return result

    def grid_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = self.grid

        def flat(values: Any) -> tuple[int, int, int]:
            grid = tuple(asked(values) if callable(asked) else asked)
            launch["grid"] = grid + (1,) * (3 - len(grid))
            launch["sequence"] = observer.sequence(launch["grid"])
            return (len(launch["sequence"]), 1, 1)

        self.grid = flat
        try:
            return call(self, *args, **kwargs)
        except stock.InterpreterError:  # it wraps what a kernel raises in texts of texts
            if (found := observer.take_error()) is not None:
                raise found from None
            raise
        finally:
            observer.end()

    return {"set_grid_dim": set_grid_dim, "set_grid_idx": set_grid_idx}, {"_init_args_hst": prepare_arguments, "__call__": grid_call}


@contextmanager
def hooked(observer: Observer) -> Iterator[None]:
    """Every launch of an interpreted kernel inside the context is reported to the observer."""
    builder, executor = _grid(observer)
    replacements = [(Builder, {**_memory(observer), **_ownership(observer), **builder}), (stock.GridExecutor, executor)]
    saved = [(owner, name, owner.__dict__[name]) for owner, functions in replacements for name in functions]
    for owner, functions in replacements:
        for name, function in functions.items():
            setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in saved:
            setattr(owner, name, function)
