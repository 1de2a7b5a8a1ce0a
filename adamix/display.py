"""How the command line shows things: progress on stderr, tables on stdout, numbers with units."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from adamix.progress import Progress

PLAIN_WIDTH = 120  # of tables where stdout is no terminal


class Live:
    """A Progress drawn by rich: the running stage as a bar, the finished ones above it."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def stage(self, title: str, total: int) -> None:
        self.finish()
        self._task = self._bars.add_task(title, total=total)

    def advance(self, steps: int = 1) -> None:
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def finish(self) -> None:
        """The running stage has ended."""
        if self._task is not None:
            task = next(task for task in self._bars.tasks if task.id == self._task)
            self._bars.update(self._task, completed=task.total)
            self._task = None


class Plain:
    """A Progress of one line a stage, for logs."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._title: str | None = None
        self._done = self._total = 0
        self._start = 0.0

    def stage(self, title: str, total: int) -> None:
        self.finish()
        with self._lock:
            self._title, self._total, self._done = title, total, 0
            self._start = time.perf_counter()

    def advance(self, steps: int = 1) -> None:
        with self._lock:
            self._done += steps

    def finish(self) -> None:
        """Write the line of the stage that has ended."""
        with self._lock:
            if self._title is not None:
                spent = seconds_text(time.perf_counter() - self._start)
                self._write(f"{self._title}: {self._done}/{self._total} in {spent}")
            self._title = None


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Bars with counts, elapsed and remaining time where stderr is a terminal, else plain lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        plain = Plain(lambda line: print(line, file=sys.stderr, flush=True))
        yield plain
        plain.finish()
        return
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), BarColumn(),
               MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Bars(*columns, console=console) as bars:
        live = Live(bars)
        yield live
        live.finish()


def show_json(body: dict[str, object]) -> None:
    """One JSON object, and nothing else, on stdout."""
    print(json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False, default=str))


def show_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Two columns without a frame: what, and its value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for what, value in facts:
        table.add_row(what, value)
    _console().print(table)


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], *,
               last_is_total: bool = False) -> None:
    """A table whose first column is text and whose others are numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, title in enumerate(header):
        table.add_column(title, justify="right" if position else "left", no_wrap=not position)
    for position, row in enumerate(rows):
        if last_is_total and position == len(rows) - 1:
            table.add_section()
        table.add_row(*row)
    _console().print(table)


def _console() -> Console:
    """Stdout as it is now (tests replace it), wide enough for tables where it is no terminal."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False,
                                                       width=PLAIN_WIDTH)


def bytes_text(count: int) -> str:
    """`1536` -> `1.50 KiB`."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.{2 if size < 100 else 1}f} {units[0]}"


def percent_text(share: float | None) -> str:
    """`0.0123` -> `1.23 %`; "-" for None."""
    if share is None:
        return "-"
    return f"{100 * share:.3g} %" if share < 1 else f"{100 * share:.0f} %"


def number_text(value: float | None, digits: int = 4) -> str:
    """A few significant digits; "-" for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def seconds_text(seconds: float) -> str:
    """`75.2` -> `1 min 15 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
