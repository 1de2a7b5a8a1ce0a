"""The picture and the tables of whole models that serve many fine-tunes, from the committed rows.

    python benchmarks/plot_serving.py               # the picture into benchmarks/results
    python benchmarks/plot_serving.py --table       # the README's tables

Memory, prefill and decode against the number of fine-tunes, as the paper's Figure 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator
from plot import DPI, INK, RESULTS, label_axes, tidy
from rows import ServingRow, read_rows
from tables import origin, percent, table

ROWS = RESULTS / "serving.csv"
PICTURE = "serving.png"
STYLES = {"adamix": ("#0072b2", "o"), "separate models": ("#d55e00", "s"),
          "LoRA": ("#009e73", "^"), "base": ("#7f7f7f", "x")}
LABELS = {"adamix": "adamix", "separate models": "separate models, in turn",
          "LoRA": "16-bit LoRA of equal bytes (PEFT)", "base": "base alone, same batch"}
HEADINGS = {"separate models": "separate models in turn, ms", "LoRA": "LoRA (PEFT), ms"}
ROUNDING = 0.01  # GB: a bank with less room than that is full


def place_gb(row: ServingRow) -> float:
    """What each place for a fine-tune takes, where models hold one; 0 where they do not."""
    if row.impl != "adamix" or row.weights_gb is None or row.model_gb is None:
        return 0.0
    return (row.weights_gb - row.model_gb) / row.slots


def empty_gb(row: ServingRow) -> float:
    """The places of the bank, allocated for the most fine-tunes of the run, that this row left."""
    return (row.slots - row.finetunes) * place_gb(row)


def memory_gb(row: ServingRow) -> float | None:
    """Allocated at most, with as many places as fine-tunes."""
    return None if row.peak_gb is None else row.peak_gb - empty_gb(row)


# A panel's title and what it shows.
PANELS: dict[str, Callable[[ServingRow], float | None]] = {
    "memory allocated at most, GB\n(lower is better)": memory_gb,
    "prefill of all prompts, ms\n(lower is better)": lambda row: row.prefill_ms,
    "decoded tokens a second, all rows\n(higher is better)": lambda row: row.tokens_per_s}


def latest(rows: Sequence[ServingRow]) -> list[ServingRow]:
    """The last row of each model, way and number of fine-tunes that was measured."""
    found = {(row.model, row.layers, row.dtype, row.impl, row.finetunes,
              row.path.startswith("compiled")): row for row in rows if row.decode_ms is not None}
    return sorted(found.values(), key=lambda row: (row.model, -row.layers, row.finetunes))


# --- the picture -------------------------------------------------------------------------------


def figure_of(rows: Sequence[ServingRow]) -> Figure | None:
    """The three panels for the deepest model among the rows; None where it has no two points."""
    some = [row for row in rows if row.layers == max(row.layers for row in rows)]
    if len({row.finetunes for row in some}) < 2:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for panel, (title, value) in zip(panels, PANELS.items(), strict=True):
        _panel(panel, some, title, value)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    if any(empty_gb(row) > ROUNDING for row in some):
        color, marker = STYLES["adamix"]
        handles["less the empty places of a larger bank"] = Line2D(
            [], [], color=color, marker=marker, markerfacecolor="white", linewidth=0, markersize=5)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=9)
    first = some[0]
    figure.suptitle(f"{first.model}, {first.layers} layers: a batch of one row a fine-tune, "
                    f"prompts of {first.prompt} tokens ({first.device})", fontsize=11)
    return figure


def _panel(panel: Axes, rows: Sequence[ServingRow], title: str,
           value: Callable[[ServingRow], float | None]) -> None:
    for impl, (color, marker) in STYLES.items():
        some = [row for row in rows if row.impl == impl and value(row) is not None]
        points = [(row.finetunes, value(row) or 0.0) for row in some]
        if not points:
            continue
        panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5,
                   linewidth=2 if impl == "adamix" else 1.2, zorder=2.5,
                   label=LABELS[impl] + ", eager" * ("eager" in some[-1].path))
        hollow = [point for point, row in zip(points, some, strict=True)
                  if value is memory_gb and empty_gb(row) > ROUNDING]
        if hollow:
            panel.plot(*zip(*hollow, strict=True), color=color, marker=marker, markersize=5,
                       markerfacecolor="white", linewidth=0, zorder=2.6)
    _advantage(panel, rows, value)
    counts = sorted({row.finetunes for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(counts, [str(count) for count in counts])
    narrow = value is memory_gb  # less than two decades: more ticks
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    panel.set_title(title, fontsize=10)
    label_axes(panel, "fine-tunes", "")
    tidy(panel)


def _advantage(panel: Axes, rows: Sequence[ServingRow],
               value: Callable[[ServingRow], float | None]) -> None:
    """How far adamix and separate models lie apart, where there are most of these."""
    of = {(row.impl, row.finetunes): value(row) for row in rows}
    counts = [count for impl, count in of
              if impl == "separate models" and of[impl, count] and of.get(("adamix", count))]
    if not counts:
        return
    at = max(counts)
    ends = sorted(of[impl, at] or 0.0 for impl in ("adamix", "separate models"))
    if ends[1] < 1.2 * ends[0]:  # no room for an arrow
        return
    panel.annotate("", (at, ends[0]), (at, ends[1]),
                   arrowprops={"arrowstyle": "<->", "color": INK, "shrinkA": 4, "shrinkB": 4})
    panel.annotate(f"{ends[1] / ends[0]:.2f}×", (at, (ends[0] * ends[1]) ** 0.5), fontsize=9,
                   xytext=(5, 0), textcoords="offset points", va="center")


# --- the tables --------------------------------------------------------------------------------


def markdown(rows: Sequence[ServingRow]) -> str:
    """A table a model, a line a number of fine-tunes, and where the rows are from."""
    parts = []
    for model, layers, prompt in dict.fromkeys((row.model, row.layers, row.prompt) for row in rows):
        some = [row for row in rows
                if (row.model, row.layers, row.prompt) == (model, layers, prompt)]
        lines = [_line({row.impl: row for row in some if row.finetunes == count})
                 for count in sorted({row.finetunes for row in some})]
        shown = [name for name in lines[0] if any(line[name] for line in lines)]
        parts.append(f"{_title(some)}\n\n"
                     f"{table(shown, [[line[name] for name in shown] for line in lines])}")
    return "\n\n".join([*parts, origin(rows)]) if parts else "no rows"


def _title(rows: Sequence[ServingRow]) -> str:
    title = (f"{rows[0].model}, {rows[0].layers} layers, a batch of one row a fine-tune, prompts "
             f"of {rows[0].prompt} tokens")
    bank = max((row for row in rows if place_gb(row)), key=lambda row: row.slots, default=None)
    if bank is not None:
        size, share = place_gb(bank), (bank.model_gb or 0.0) / place_gb(bank)
        title += f"; a fine-tune takes {size:.3f} GB, 1/{share:.1f} of the model"
    return f"{title}:"


def _line(of: dict[str, ServingRow]) -> dict[str, str]:
    """Cells by heading, of the ways to serve one number of fine-tunes; empty where not measured."""
    own, base = of.get("adamix"), of.get("base")
    cells = {"fine-tunes": str(next(iter(of.values())).finetunes),
             "adamix, ms a step (over the base)": _over(own, base, lambda row: row.decode_ms, 2, 1),
             "tokens/s": f"{own.tokens_per_s:.0f}" if own and own.tokens_per_s else "",
             "base alone, ms": f"{base.decode_ms:.2f}" if base else ""}
    for impl, heading in HEADINGS.items():
        row = of.get(impl)
        cells[heading] = f"{row.decode_ms:.2f}" if row else ""
        if row and own:
            cells[heading] += f" ({(row.decode_ms or 0) / (own.decode_ms or 1):.2f}×)"
            cells[heading] += ", eager" if "eager" in row.path and own.path != row.path else ""
    cells["prefill, ms (over the base)"] = _over(own, base, lambda row: row.prefill_ms, 0, 0)
    for impl in ("adamix", "separate models"):
        used = memory_gb(of[impl]) if impl in of else None
        cells[f"GB, {impl}"] = f"{used:.1f}" if used else ""
    return cells


def _over(own: ServingRow | None, base: ServingRow | None,
          value: Callable[[ServingRow], float | None], digits: int, share_digits: int) -> str:
    """A figure of adamix, in brackets how much it is above the base's."""
    if own is None or not (ms := value(own)):
        return ""
    under = value(base) if base else None
    more = f" (+{percent(ms / under - 1, share_digits)})" if under else ""
    return f"{ms:.{digits}f}{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=ROWS, help="another file of rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the picture")
    parser.add_argument("--table", action="store_true", help="print the tables, no picture")
    args = parser.parse_args()
    rows = latest(read_rows([args.csv], ServingRow)) if args.csv.exists() else []
    if args.table:
        print(markdown(rows))
        return
    figure = figure_of(rows) if rows else None
    if figure is None:
        print(f"{PICTURE}: no rows for it")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(args.out / PICTURE, dpi=DPI)
    print(args.out / PICTURE)


if __name__ == "__main__":
    main()
