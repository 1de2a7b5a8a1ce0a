"""The integer programs in processes of their own, while a GPU works on other matrices.

A program's Python holds the interpreter's lock, which every launch of a kernel needs too.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import torch
from torch import Tensor

from adamix.compression.allocate import allocate
from adamix.errors import SolverError
from adamix.processes import Processes, answer


class Solvers(Processes):
    """Calls `allocate` in one of some processes; threads may share it."""

    def __init__(self, processes: int) -> None:
        super().__init__(["-m", "adamix.solving"], processes)

    def allocate(self, errors: Tensor, costs: Sequence[int], budget: int, **options: object
                 ) -> Tensor:
        """As `allocate`, whose errors it raises.

        Raises:
            SolverError: the process ended.
        """
        with self.lent() as process:
            try:
                _send(process.stdin, (errors.cpu().numpy(), list(costs), budget, options))
                found = pickle.load(process.stdout)
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                raise SolverError(
                    f"a solver's process ended with status {process.poll()}") from error
        if isinstance(found, Exception):
            raise found
        return torch.from_numpy(found)


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
    answer(serve)
