"""Functions of matrices in processes of their own, with one torch thread each.

The methods of `methods/` are loops of small torch calls and models of integer programs built in
Python: as threads they wait for the interpreter's lock, and many cores are no faster than one.
"""

from __future__ import annotations

import atexit
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from adamix.parallel import available_cores, workers
from adamix.processes import Process, Processes

# As __main__ its names would differ.
SERVE = "from adamix.processes import answer; import method_processes as m; answer(m.serve)"


class MethodProcesses(Processes):
    """Calls functions that are found by name, or partials of them; threads may share it."""

    def __init__(self, count: int) -> None:
        super().__init__(["-c", SERVE], count)

    def prepare(self, function: Callable[..., object]) -> None:
        """Have each process import what a function needs; none may be at work."""
        with workers(len(self)) as executor:
            list(executor.map(lambda process: _ask(process, callable, function), self._processes))

    def call(self, function: Callable[..., object], *arguments: object) -> object:
        """function(*arguments) in a process that is free, whose errors it raises.

        Raises:
            RuntimeError: the process ended.
        """
        with self.lent() as process:
            return _ask(process, function, *arguments)


@cache
def processes() -> MethodProcesses:
    """One a core, from the first call to the end of this process."""
    pool = MethodProcesses(available_cores())
    atexit.register(pool.close)
    return pool


def _ask(process: Process, *request: object) -> object:
    message = _pickled(request)  # an error here leaves the pipe as it was
    try:
        _send(process.stdin, message)
        worked, found = pickle.loads(pickle.load(process.stdout))
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        process.kill()  # if it has not ended
        raise RuntimeError(f"a method's process ended with status {process.wait()}") from error
    if not worked:
        raise found
    return found


class _Pickler(pickle.Pickler):
    """Tensors as arrays: their own pickling copies through a file in memory."""

    def reducer_override(self, value: object) -> object:
        if type(value) is not Tensor or value.dtype == torch.bfloat16:
            return NotImplemented
        return _tensor_of, (value.detach().cpu().numpy(),)


def _tensor_of(array: np.ndarray) -> Tensor:
    """A copy where torch aligns it: sums of libraries may depend on that."""
    return torch.from_numpy(array).clone()


def _pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _send(pipe: BinaryIO, message: bytes) -> None:
    """Pickled twice: what cannot be loaded is read to its end all the same."""
    pickle.dump(message, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _answer(request: bytes) -> bytes:
    try:
        function, *arguments = pickle.loads(request)
        return _pickled((True, function(*arguments)))
    except Exception as error:  # whatever it is belongs to who asked
        try:
            message = _pickled((False, error))
            pickle.loads(message)  # some errors can be pickled but not loaded
            return message
        except Exception:
            return _pickled((False, RuntimeError(f"{type(error).__name__}: {error}")))


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the requests end."""
    torch.set_num_threads(1)
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        _send(answers, _answer(request))
