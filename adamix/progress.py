"""How long work tells where it is: silent by default, drawn by the command line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives the stages of long work; may be called from several threads."""

    def stage(self, title: str, total: int) -> None:
        """A stage of `total` steps begins; the one before it has ended."""

    def advance(self, steps: int = 1) -> None:
        """Steps of the current stage are done."""


class Silent:
    """A Progress that shows nothing."""

    def stage(self, title: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's wall-clock seconds to `seconds[name]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
