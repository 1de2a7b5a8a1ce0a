"""The tables that bench_paper.py's rows make; without torch."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from accuracy_tables import mean_of
from paper_rows import ComponentRow, ErrorRow, PlanRow, StageRow
from rows import AccuracyRow, RowKind, read_rows
from tables import table

ROWS = Path(__file__).parent / "results"
FILES: dict[type, str] = {
    AccuracyRow: "paper_widths.csv", ErrorRow: "paper_errors.csv", StageRow: "paper_seconds.csv",
    ComponentRow: "paper_components.csv", PlanRow: "paper_plan.csv"}
OURS, PUBLISHED = "adamix", "AdaMix, published"
PUBLISHED_WIDTHS = 4  # f_max where a name does not say it
NONE = "none"
GROUPS = {"low": "Low", "mid": "Mid", "high": "High"}
AVERAGE = "average"


def read(folder: Path, kind: type[RowKind]) -> list[RowKind]:
    """The last row of each key; none where the folder has no such file."""
    path = folder / FILES[kind]
    return list({row.key: row for row in read_rows([path], kind)}.values()) if (
        path.exists()) else []


def markdown(folder: Path) -> str:
    """Every table that the rows in a folder suffice for."""
    parts = [widths_tables(read(folder, AccuracyRow)), group_tables(read(folder, ErrorRow)),
             kind_tables(read(folder, ErrorRow)), seconds_tables(read(folder, StageRow))]
    return "\n\n".join(filter(None, parts)) or "no rows"


def of_each(rows: Iterable[RowKind], make: Callable[[str, list[RowKind]], str]) -> str:
    """A table a model and family."""
    groups: dict[tuple[str, str], list[RowKind]] = {}
    for row in rows:
        groups.setdefault((row.model, row.family), []).append(row)
    return "\n\n".join(make(", ".join(filter(None, key)), some) for key, some in groups.items())


# --- Table 6 -----------------------------------------------------------------------------------


def widths_of(method: str) -> tuple[str, str]:
    """The method and its f_max, both as the table has them."""
    found = re.fullmatch(r"(.*), f_max (\d+|none)", method)
    if found:
        return found[1], found[2]
    return method, str(PUBLISHED_WIDTHS) if method == PUBLISHED else "–"


def widths_tables(rows: Iterable[AccuracyRow]) -> str:
    return of_each(rows, _widths_table)


def _widths_table(title: str, rows: list[AccuracyRow]) -> str:
    def order(method: str) -> tuple[bool, bool, int]:
        name, most = widths_of(method)
        return name == OURS, name == PUBLISHED, int(most) if most.isdigit() else 9

    lines = []
    for method in sorted({row.method for row in rows}, key=order):
        own = [row for row in rows if row.method == method]
        sizes = [None if row.bytes is None else row.bytes / 1e6 for row in own]
        lines.append([*widths_of(method), mean_of([row.accuracy for row in own], 1),
                      *(mean_of([getattr(row, name) for row in own], 4) for name in (
                          "kl_prompts", "kl_text", "error", "error_held_out")),
                      mean_of(sizes, 2, spread=False)])
    head = ["method", "f_max", "right, %", "KL, prompts", "KL, text", "error", "held out", "MB"]
    prompts = max(row.prompts or 0 for row in rows)
    asked = f" ({prompts} prompts)" if prompts else ""
    ratios = ", ".join(f"1/{ratio:g}" for ratio in sorted({row.ratio for row in rows}))
    return (f"Table 6, {title} at {ratios}{asked}: the widths that may be in use "
            f"(0 bits counted).\n\n{table(head, lines, numbers=True)}")


# --- Tables 8 and 10 ---------------------------------------------------------------------------


def average(rows: Sequence[ErrorRow], field: str) -> float | None:
    """Over all matrices of the rows; of several seeds the mean."""
    known = [(getattr(row, field), row.matrices) for row in rows
             if getattr(row, field) is not None]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if (
        known) else None


def cells(rows: Sequence[ErrorRow], fields: tuple[str, str], scale: float = 1.0) -> list[str]:
    """All and Out of each group of layers."""
    found = [average([row for row in rows if row.group == group], field)
             for group in GROUPS for field in fields]
    return ["" if value is None else f"{scale * value:.3g}" for value in found]


RELATIVE, SQUARE = ("error_all", "error_out"), ("square_all", "square_out")
GROUP_HEAD = [title for name in GROUPS.values() for title in (f"{name}: All", "Out")]


def group_tables(rows: Iterable[ErrorRow]) -> str:
    return of_each(rows, _group_table)


def _group_table(title: str, rows: list[ErrorRow]) -> str:
    methods = list(dict.fromkeys(row.method for row in rows))
    parts = []
    for what, fields, scale in (("relative output error", RELATIVE, 1.0),
                                ("mean square error of an output × 100", SQUARE, 100.0)):
        lines = [[method, *cells([row for row in rows if row.method == method], fields, scale)]
                 for method in methods]
        parts.append(f"Table 8, {title}: {what} by thirds of the layers; {tokens_of(rows)}.\n\n"
                     f"{table(['method', *GROUP_HEAD], lines, numbers=True)}")
    return "\n\n".join(parts)


def kind_tables(rows: Iterable[ErrorRow]) -> str:
    return of_each(rows, _kind_table)


def _kind_table(title: str, rows: list[ErrorRow]) -> str:
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = []
    for kind in [*dict.fromkeys(row.kind for row in rows), AVERAGE]:
        for method in methods:
            own = [row for row in rows if row.method == method and kind in (row.kind, AVERAGE)]
            lines.append([kind, method, *cells(own, RELATIVE)])
    return (f"Table 10, {title}: relative output error by type of layer; {tokens_of(rows)}.\n\n"
            f"{table(['layer', 'method', *GROUP_HEAD], lines, numbers=True)}")


def tokens_of(rows: Sequence[ErrorRow]) -> str:
    tokens = " or ".join(str(count) for count in sorted({row.tokens or 0 for row in rows}))
    return f"Out: the 1 % largest outputs of the fine-tune, of {tokens} tokens"


# --- Table 9 -----------------------------------------------------------------------------------

STAGES = ("decomposition", "simulation", "optimization", "quantization", "other", "whole")


def seconds_tables(rows: Iterable[StageRow]) -> str:
    groups: dict[tuple[str, str, str], list[StageRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.family, row.device), []).append(row)
    return "\n\n".join(_seconds_table(", ".join(filter(None, key)), some)
                       for key, some in groups.items())


def _seconds_table(title: str, rows: list[StageRow]) -> str:
    lines = [[row.kind, row.shape.replace("x", " × "), str(row.matrices),
              *(f"{getattr(row, stage):.3f}" for stage in STAGES)] for row in rows]
    sums = [sum(getattr(row, stage) for row in rows) for stage in STAGES]
    lines.append(["a layer", "", "", *(f"{value:.3f}" for value in sums)])
    threads = ", ".join(dict.fromkeys(str(row.threads) for row in rows))
    matrices = statistics.mode(row.matrices or 0 for row in rows)
    return (f"Table 9, {title} at 1/{rows[0].ratio:g}: seconds a matrix, one after the other "
            f"(means of {matrices}; threads {threads}).\n\n"
            f"{table(['layer', 'out × in', 'matrices', *STAGES], lines, numbers=True)}")
