"""Threads side by side, each with one thread inside its products and factorizations.

Sums are then made of the same parts in the same order however many threads there are, and small
matrices, of which there are many, keep all cores busy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(executor: Executor, function: Callable[[Item], Result], items: Iterable[Item],
             ahead: int) -> Iterator[Result]:
    """function(item) for each item, in order, with at most `ahead` results in the making or
    waiting: `Executor.map` would begin, and keep, all of them."""
    running: deque = deque()
    for item in items:
        if len(running) >= ahead:
            yield running.popleft().result()
        running.append(executor.submit(function, item))
    while running:
        yield running.popleft().result()


@contextmanager
def workers(threads: int | None = None) -> Iterator[Executor]:
    """An executor of `threads` threads (default: `available_cores()`).

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    executor = ThreadPoolExecutor(threads or available_cores())
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)  # after an error nothing queued is begun
        torch.set_num_threads(before)
