"""Requests from their arrival to their last result: which fine-tune each is on, and who may run."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from adamix.errors import AdamixError, BankError, BankFullError
from adamix.serving.bank import DeltaBank

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import RequestState

# Most requests that may pass the first in line while that waits for room on the device: passing
# keeps the device busy, a limit lets everyone's turn come.
MAX_PASSING = 256


def forks(request_id: str, count: int) -> list[str]:
    """Ids that transformers gives to the further sequences of a request."""
    return [f"{request_id}__child#{number}" for number in range(count)]


def finetune_of_each(inputs: Sequence[list[int]], finetunes: Sequence[str | None] | None
                     ) -> list[tuple[list[int], str | None]]:
    """Each input with its fine-tune; without any, with the base.

    Raises:
        BankError: there are not as many.
    """
    names = [None] * len(inputs) if finetunes is None else finetunes
    if len(names) != len(inputs):
        raise BankError(f"a fine-tune for each input: got {len(names)} for {len(inputs)}")
    return list(zip(inputs, names, strict=True))


class InFlight:
    """The sequences that are still expected, and of those that run, the hold on their fine-tune.

    A sequence is one answer to a request; most requests have one.
    """

    def __init__(self, bank: DeltaBank, sequences_each: int) -> None:
        self._bank, self._further = bank, sequences_each - 1
        self._finetunes: dict[str, str | None] = {}
        self._held: set[str] = set()  # sequences that hold their fine-tune
        self._no_room: set[str] = set()  # fine-tunes that did not fit, until one is released
        self._adding, self._numbers = threading.Lock(), itertools.count()

    def __len__(self) -> int:
        return len(self._finetunes)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._finetunes

    def finetune(self, sequence: str) -> str | None:
        """The one it is on; None is the base."""
        return self._finetunes[sequence]

    def sequences(self, request_id: str) -> list[str]:
        """All of a request's."""
        return [request_id, *forks(request_id, self._further)]

    def new_id(self) -> str:
        """One that no request has had from here."""
        return next(name for name in (f"req_{number}" for number in self._numbers)
                    if name not in self._finetunes)

    def add(self, request_id: str, finetune: str | None) -> None:
        """Expect a request's results.

        Raises:
            BankError: an unknown fine-tune, or an id that is in use.
        """
        if finetune is not None and finetune not in self._bank:
            raise BankError(f"no fine-tune {finetune!r} is loaded; loaded are: "
                            f"{', '.join(self._bank.names) or 'none'}")
        with self._adding:
            sequences = self.sequences(request_id)
            if any(name in self._finetunes for name in sequences):
                raise BankError(f"a request of the id {request_id!r} is not answered yet")
            self._finetunes.update(dict.fromkeys(sequences, finetune))

    def admit(self, request_id: str) -> bool:
        """Hold a request's fine-tune on the device; False where it has to wait for room.

        Raises:
            BankError: it was unloaded, or does not fit though no other is in flight.
        """
        name = self._finetunes[request_id]
        if name is None:
            return True
        if name in self._no_room:
            return False
        sequences = self.sequences(request_id)
        try:
            self._bank.hold(name, len(sequences))
        except BankFullError:
            if not self._held:
                raise
            self._no_room.add(name)
            return False
        self._held.update(sequences)
        return True

    def release(self, *sequences: str) -> None:
        """They run no more. Before their results are delivered, so that unloading may follow."""
        for name in sequences:
            if name in self._held:
                self._held.discard(name)
                self._bank.release(self._finetunes[name])
                self._no_room.clear()

    def forget(self, *sequences: str) -> None:
        """They are answered, or no answer will come."""
        self.release(*sequences)
        for name in sequences:
            self._finetunes.pop(name, None)

    def forget_all(self) -> None:
        """Nothing is expected any more."""
        self.forget(*list(self._finetunes))


class Line(queue.Queue["RequestState"]):
    """Requests in order of arrival, each let through when its fine-tune is on the device."""

    def __init__(self, size: int, in_flight: InFlight,
                 refuse: Callable[[RequestState, AdamixError], None]) -> None:
        super().__init__(size)
        self._in_flight, self._refuse = in_flight, refuse
        self._passed = 0  # requests that went before the first in line
        self.is_open = False  # let all through: they are to fail

    def _get(self) -> RequestState:
        at = 0
        while at < min(len(self.queue), 1 if self._passed >= MAX_PASSING else MAX_PASSING):
            state = self.queue[at]
            try:
                admitted = self.is_open or self._in_flight.admit(state.request_id)
            except AdamixError as error:
                self._take(at)
                self.not_full.notify()
                self._refuse(state, error)
                continue
            if admitted:
                self._take(at)
                return state
            at += 1
        raise queue.Empty

    def _take(self, at: int) -> None:
        del self.queue[at]
        self._passed = self._passed + 1 if at else 0

    def remove(self, request_id: str) -> bool:
        """Take a request out of the line; False where it is not in it."""
        with self.mutex:
            for at, state in enumerate(self.queue):
                if state.request_id == request_id:
                    self._take(at)
                    self.not_full.notify()
                    return True
        return False
