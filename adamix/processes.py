"""Processes of this interpreter that answer through their pipes, one caller at a time."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

Process = subprocess.Popen[bytes]


class Processes:
    """So many of them, without a GPU and with one thread each; threads may share them.

    They are started by hand: the parent may have CUDA initialised, so that it must not fork, and
    `multiprocessing` would run a user's main module in each.

    Args:
        arguments: what the interpreter runs.
        count: how many.
    """

    def __init__(self, arguments: Sequence[str], count: int) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                                    "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._processes = [subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, env=environment)
                           for _ in range(count)]
        self._free: queue.Queue[Process] = queue.Queue()
        for process in self._processes:
            self._free.put(process)

    def __len__(self) -> int:
        return len(self._processes)

    @contextmanager
    def lent(self) -> Iterator[Process]:
        """One that is free, as soon as there is one, until the end of the with statement."""
        process = self._free.get()
        try:
            yield process
        finally:
            self._free.put(process)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()


def answer(serve: Callable[[BinaryIO, BinaryIO], None]) -> None:
    """In such a process: serve(requests, answers). Answers go where standard output went; what else
    is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
