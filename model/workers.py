"""Independent jobs on as many threads as PyTorch has, each of them on one.

PyTorch's own threads share the work of one operation at a time. Packing is thousands of short operations: two threads then wait for
each other as long as they work, and keep a core busy while they wait. Jobs that need nothing of each other don't meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

MOST = 8  # threads: beyond, Python's lock is what they wait for


def run(jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of `jobs`, in their order. Raises what the first of them, in that order, raises, once those that run have ended."""
    threads = min(torch.get_num_threads(), len(jobs), MOST)
    if threads < 2:
        return [job() for job in jobs]
    whole = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        return [future.result() for future in [pool.submit(job) for job in jobs]]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(whole)  # a part of that setting is the whole process's
