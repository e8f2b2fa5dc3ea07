"""What `bench offline` says of a report beside its figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from granite_kernels.bench.offline.tables import issue_bound


def test_what_is_issue_bound_is_named_for_each_card() -> None:
    launches = [
        SimpleNamespace(traffic=SimpleNamespace(name=name), instructions_per_byte=per_byte)
        for name, per_byte in (("_linear_kernel", 0.18), ("_norm_kernel", 0.11), ("_linear_kernel", 0.25), ("_embed_kernel", 0.1))
    ]
    report: Any = SimpleNamespace(launches=launches)
    assert issue_bound(report) == (
        "Issue-bound, above 75% of a card's budget: A100 80GB (0.299): linear. H100 SXM (0.277): linear. H200 (0.193): linear. "
        "B200 (0.137): linear, norm."
    )
