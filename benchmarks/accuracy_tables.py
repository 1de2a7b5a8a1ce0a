"""The tables that bench_accuracy.py's rows make; without torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from rows import AccuracyRow
from tables import table

ROWS = Path(__file__).parent / "results" / "accuracy.csv"
BASE, FINETUNE, LORA = "base", "fine-tune", "LoRA"  # what is no method of compression


def markdown(rows: Iterable[AccuracyRow]) -> str:
    """A table a model and family: a line a method, columns by ratio; means over the seeds, and
    their standard deviation in brackets where there are several."""
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
        f"{name} {_mean([row.accuracy for row in found], 1)} %" for name, found in whole.items()
        if found)
    apart = whole[BASE]
    if apart:
        ends += (f"; KL(fine-tune ‖ base) {_mean([row.kl_prompts for row in apart], 4)} on "
                 f"prompts, {_mean([row.kl_text for row in apart], 4)} on text")
    head = ["method"] + [title for ratio in ratios for title in (
        f"1/{ratio:g}: right, %", "KL, prompts", "KL, text", "error", "held out", "MB")]
    lines = []
    for method in methods:
        line = [method]
        for ratio in ratios:
            own = [row for row in rows if (row.method, row.ratio) == (method, ratio)]
            sizes = [None if row.bytes is None else row.bytes / 1e6 for row in own]
            line += [_mean([row.accuracy for row in own], 1),
                     _mean([row.kl_prompts for row in own], 4),
                     _mean([row.kl_text for row in own], 4),
                     _mean([row.error for row in own], 4),
                     _mean([row.error_held_out for row in own], 4), _mean(sizes, 2, spread=False)]
        lines.append(line)
    return (f"**{model}, {family}** ({prompts} prompts): {ends}.\n\n"
            f"{table(head, lines, numbers=True)}")


def _mean(values: list[float | None], digits: int, *, spread: bool = True) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.{digits}f}"
    if len(known) < 2 or not spread:
        return mean
    return f"{mean} ({statistics.stdev(known):.{digits}f})"
