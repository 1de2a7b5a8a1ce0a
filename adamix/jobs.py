"""What is being compressed, and the memory that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Generic, TypeVar

from adamix.memory import MemoryPlan

Result = TypeVar("Result")
ASK = 1.0  # seconds between two looks at what else could end the run


class Jobs(Generic[Result]):
    """Groups of matrices that are being worked on, and the bytes that they take.

    Args:
        executor: runs them.
        done: gets what they give.
        plan: of the memory that they share with the calibration.
        check: raises what else ends the run; called now and then while waiting.
    """

    def __init__(self, executor: Executor, done: dict[str, Result], plan: MemoryPlan,
                 check: Callable[[], None]) -> None:
        self.plan, self._check = plan, check
        self._executor, self._done = executor, done
        self._running: dict[Future[dict[str, Result]], int] = {}

    def submit(self, size: int, waiting: int, run: Callable[[], dict[str, Result]]) -> None:
        """Begin a group, which takes `size` bytes, as soon as there is room for it; until it is
        begun it takes `waiting`."""
        if self.plan.free is None:
            size = waiting  # with no bound only what waits counts, so that it does not pile up
        else:
            self._wait(self.plan.free - size - waiting)
        self._running[self._executor.submit(run)] = size

    def make_room(self) -> None:
        """Wait until the next inputs can be taken.

        Without a bound as soon as few enough groups are left that no thread will run out of them:
        to be further ahead costs memory and brings nothing.
        """
        plan = self.plan
        if plan.free is None:
            self._wait(plan.grams, 2 * plan.threads)
        else:
            self._wait(plan.free - plan.making)

    def finish(self) -> None:
        """Wait for all."""
        self._wait(-1)

    def _wait(self, most: int, groups: float = math.inf) -> None:
        """Until the running groups take no more than so many bytes, and are no more than so many.
        Raises their errors."""
        while self._running:
            ended = [future for future in self._running if future.done()]
            for future in ended:
                del self._running[future]
                self._done.update(future.result())
            if sum(self._running.values()) <= most and len(self._running) <= groups:
                return
            if not ended:
                wait(self._running, timeout=ASK, return_when=FIRST_COMPLETED)
                self._check()
