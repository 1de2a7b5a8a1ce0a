"""The tables that bench_accuracy.py's rows make; without torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from rows import AccuracyRow
from tables import table

ROWS = Path(__file__).parent / "results" / "accuracy.csv"
WRITERS = ROWS.with_name("accuracy_writers.csv")  # the same pairs, calibrated by one model's text
BASE, FINETUNE, LORA = "base", "fine-tune", "LoRA"  # what is no method of compression
OURS, DELTA_COME, PUBLISHED = "adamix", "Delta-CoMe", "AdaMix, published"
INPUTS = {"error": "on the calibration's inputs", "error_held_out": "on held-out ones"}


def markdown(rows: Iterable[AccuracyRow]) -> str:
    """A table a model and family: a line a method, columns by ratio; means over the seeds, and
    their standard deviation in brackets where there are several; and how errors compare."""
    last = {row.key: row for row in rows}  # of a repeated measurement the last
    groups: dict[tuple[str, str], list[AccuracyRow]] = {}
    for row in last.values():
        groups.setdefault((row.model, row.family), []).append(row)
    return "\n\n".join(_table(name, family, found) for (name, family), found in groups.items())


def _table(model: str, family: str, rows: list[AccuracyRow]) -> str:
    ratios = sorted({row.ratio for row in rows if row.ratio is not None})
    methods = list(dict.fromkeys(row.method for row in rows if row.ratio is not None))
    prompts = max(row.prompts or 0 for row in rows)
    whole = {name: [row for row in rows if row.method == name] for name in (BASE, FINETUNE)}
    ends = "; ".join(
        f"{name} {mean_of([row.accuracy for row in found], 1)} %" for name, found in whole.items()
        if found)
    apart = whole[BASE]
    if apart:
        ends += (f"; KL(fine-tune ‖ base) {mean_of([row.kl_prompts for row in apart], 4)} on "
                 f"prompts, {mean_of([row.kl_text for row in apart], 4)} on text")
    head = ["method"] + [title for ratio in ratios for title in (
        f"1/{ratio:g}: right, %", "KL, prompts", "KL, text", "error", "held out", "MB")]
    lines = []
    for method in methods:
        line = [method]
        for ratio in ratios:
            own = [row for row in rows if (row.method, row.ratio) == (method, ratio)]
            sizes = [None if row.bytes is None else row.bytes / 1e6 for row in own]
            line += [mean_of([row.accuracy for row in own], 1),
                     mean_of([row.kl_prompts for row in own], 4),
                     mean_of([row.kl_text for row in own], 4),
                     mean_of([row.error for row in own], 4),
                     mean_of([row.error_held_out for row in own], 4),
                     mean_of(sizes, 2, spread=False)]
        lines.append(line)
    pair = f"{model}, {family}" if family else model
    return "\n\n".join([f"**{pair}** ({prompts} prompts): {ends}.",
                        table(head, lines, numbers=True), *comparisons(rows)])


def comparisons(rows: Iterable[AccuracyRow]) -> list[str]:
    """The default against Delta-CoMe at twice its size, and against AdaMix as published at its own:
    a sentence each, where both have rows."""
    errors: dict[tuple[str, float, str], float] = {}
    for name in INPUTS:
        found: dict[tuple[str, float], list[float]] = {}
        for row in rows:
            if row.ratio is not None and getattr(row, name) is not None:
                found.setdefault((row.method, row.ratio), []).append(getattr(row, name))
        errors |= {(*key, name): statistics.mean(some) for key, some in found.items()}
    return [*_compared(errors, (OURS, 32.0), (DELTA_COME, 16.0)),
            *(line for ratio in sorted({key[1] for key in errors})
              for line in _compared(errors, (OURS, ratio), (PUBLISHED, ratio)))]


def _compared(errors: dict[tuple[str, float, str], float], ours: tuple[str, float],
              theirs: tuple[str, float]) -> list[str]:
    said = []
    for name, where in INPUTS.items():
        own, other = errors.get((*ours, name)), errors.get((*theirs, name))
        if own is not None and other:
            less = 100 * (1 - own / other)
            said.append(f"{own:.4f} for {other:.4f} {where} ({abs(less):.0f} % "
                        f"{'less' if less >= 0 else 'more'})")
    names = [f"{method} at 1/{ratio:g}" for method, ratio in (ours, theirs)]
    return [f"Error of {names[0]} beside that of {names[1]}: {', '.join(said)}."] if said else []


def mean_of(values: list[float | None], digits: int, *, spread: bool = True) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.{digits}f}"
    if len(known) < 2 or not spread:
        return mean
    return f"{mean} ({statistics.stdev(known):.{digits}f})"
