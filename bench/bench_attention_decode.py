"""attention_decode: one token of up to sixteen sequences over their caches."""

from __future__ import annotations

from collections.abc import Callable

from granite_kernels.bench import bench_attention
from granite_kernels.bench.harness import Case
from granite_kernels.bench.shapes import Setting


def cases(setting: Setting) -> list[Case]:
    return [bench_attention.case(setting, "attention_decode")] if setting.decoding else []


def test_attention_decode(measured: Callable[[], None]) -> None:
    measured()
