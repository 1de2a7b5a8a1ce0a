"""Means over the matrices of bench_methods.py's rows, and the Markdown tables of QUALITY.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rows import MethodRow, read_rows
from tables import table

ROWS = Path(__file__).resolve().parent / "results" / "methods.csv"
BUDGETS = (1.0, 0.5, 0.25)  # of the table; the picture has all


@dataclass(frozen=True)
class Mean:
    """Of one method at one budget, over the matrices."""

    bits: float
    calibration: float
    held_out: float
    rank: float
    seconds: float  # in all
    matrices: int


def read(path: Path = ROWS) -> list[MethodRow]:
    """The last row of each method, matrix and budget."""
    return list({row.key: row for row in read_rows([path], MethodRow)}.values())


def means(rows: Iterable[MethodRow]) -> dict[tuple[str, float | None], Mean]:
    """Of every method at every budget that all its matrices have a figure for."""
    of: dict[tuple[str, float | None], list[MethodRow]] = {}
    for row in rows:
        of.setdefault((row.method, row.budget), []).append(row)
    return {key: mean_of(some) for key, some in of.items()
            if all(row.bits_per_weight is not None for row in some)}


def mean_of(rows: Sequence[MethodRow]) -> Mean:
    def mean(name: str) -> float:
        return sum(getattr(row, name) or 0.0 for row in rows) / len(rows)

    return Mean(mean("bits_per_weight"), mean("error_calibration"), mean("error_held_out"),
                mean("rank"), len(rows) * mean("seconds"), len(rows))


def markdown(rows: Sequence[MethodRow]) -> str:
    """Two tables: methods at equal bits, and those of one size; by error, least first."""
    found = means(rows)
    sized = sorted({method for method, budget in found if budget in BUDGETS},
                   key=lambda method: [(found.get((method, budget)) or WORST).calibration
                                       for budget in BUDGETS])
    titles = ("used", "calibration", "held out")
    head = [title for budget in BUDGETS
            for title in (f"{budget:.2f} bits: {titles[0]}", *titles[1:])]
    lines = [[method, *(cell for budget in BUDGETS for cell in _cells(found.get((method, budget))))]
             for method in sized]
    fixed = sorted((mean.bits, method, mean) for (method, budget), mean in found.items()
                   if budget is None)
    others = [[method, *_cells(mean)] for _, method, mean in fixed]
    return "\n\n".join([table(["method", *head], lines, numbers=True),
                        table(["method of one size", *titles], others, numbers=True)])


WORST = Mean(*(float("inf"),) * 5, 0)


def _cells(mean: Mean | None) -> list[str]:
    if mean is None:
        return ["–"] * 3
    return [f"{value:.4f}" for value in (mean.bits, mean.calibration, mean.held_out)]
