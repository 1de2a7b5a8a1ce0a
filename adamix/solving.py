"""The integer programs in processes of their own, while a GPU works on other matrices.

A program's Python holds the interpreter's lock, which every launch of a kernel needs too. The
processes are started by hand: `multiprocessing` would run a user's main module in each.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import torch
from torch import Tensor

from adamix.compression.allocate import allocate
from adamix.errors import SolverError


class Solvers:
    """Calls `allocate` in one of some processes; threads may share it."""

    def __init__(self, processes: int) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                                    "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._processes = [subprocess.Popen(
            [sys.executable, "-m", "adamix.solving"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=environment) for _ in range(processes)]
        self._free: queue.Queue[subprocess.Popen[bytes]] = queue.Queue()
        for process in self._processes:
            self._free.put(process)

    def allocate(self, errors: Tensor, costs: Sequence[int], budget: int, **options: object
                 ) -> Tensor:
        """As `allocate`, whose errors it raises.

        Raises:
            SolverError: the process ended.
        """
        process = self._free.get()
        try:
            _send(process.stdin, (errors.cpu().numpy(), list(costs), budget, options))
            found = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise SolverError(f"a solver's process ended with status {process.poll()}") from error
        finally:
            self._free.put(process)
        if isinstance(found, Exception):
            raise found
        return torch.from_numpy(found)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()


@contextmanager
def solvers(processes: int) -> Iterator[Solvers]:
    """So many processes, until the end of the with statement."""
    pool = Solvers(processes)
    try:
        yield pool
    finally:
        pool.close()


def _send(pipe: BinaryIO, message: object) -> None:
    pickle.dump(message, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the requests end."""
    while True:
        try:
            errors, costs, budget, options = pickle.load(requests)
        except EOFError:
            return
        try:
            _send(answers, allocate(torch.from_numpy(errors), costs, budget, **options).numpy())
        except Exception as error:  # whatever it is belongs to who asked
            _send(answers, error)


if __name__ == "__main__":
    # Answers go where standard output went; what a solver prints goes to standard error.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
