"""Threads side by side, each with one thread inside its products and factorizations.

Sums are then made of the same parts in the same order however many threads there are, and small
matrices, of which there are many, keep all cores busy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers(threads: int | None = None) -> Iterator[Executor]:
    """An executor of `threads` threads (default: the cores that this process may use).

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    executor = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)  # after an error nothing queued is begun
        torch.set_num_threads(before)
