"""The picture and the table of whole models that serve many fine-tunes, from the committed rows.

    python benchmarks/plot_serving.py               # the picture into benchmarks/results
    python benchmarks/plot_serving.py --table       # the README's table

Memory, prefill and decode against the number of fine-tunes, as the paper's Figure 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plot import DPI, RESULTS, tidy
from rows import ServingRow, read_rows
from tables import table

ROWS = RESULTS / "serving.csv"
PICTURE = "serving.png"
STYLES = {"adamix": ("#0072b2", "o"), "separate models": ("#d55e00", "s"),
          "LoRA": ("#009e73", "^"), "base": ("#7f7f7f", "x")}
LABELS = {"adamix": "adamix", "separate models": "separate models, in turn",
          "LoRA": "16-bit LoRA of equal bytes (PEFT)", "base": "the base alone, same batch"}
PANELS = {"peak_gb": "memory, GB", "prefill_ms": "prefill of all prompts, ms",
          "tokens_per_s": "decoded tokens a second"}


def latest(rows: Sequence[ServingRow]) -> list[ServingRow]:
    """The last row of each model, way and number of fine-tunes that was measured."""
    found = {(row.model, row.layers, row.dtype, row.impl, row.finetunes,
              row.path.startswith("compiled")): row for row in rows if row.decode_ms is not None}
    return sorted(found.values(), key=lambda row: (row.model, -row.layers, row.finetunes))


def figure_of(rows: Sequence[ServingRow]) -> Figure | None:
    """The three panels for the deepest model among the rows; None where it has no two points."""
    some = [row for row in rows if row.layers == max(row.layers for row in rows)]
    if len({row.finetunes for row in some}) < 2:
        return None
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for panel, (field, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _panel(panel, some, field, label)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    first = some[0]
    figure.suptitle(f"{first.model}, {first.layers} layers, a row a fine-tune, prompts of "
                    f"{first.prompt} tokens ({first.device})", fontsize=11)
    return figure


def _panel(panel: Axes, rows: Sequence[ServingRow], field: str, label: str) -> None:
    for impl, (color, marker) in STYLES.items():
        points = [(row.finetunes, getattr(row, field)) for row in rows
                  if row.impl == impl and getattr(row, field) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4,
                       linewidth=2 if impl == "adamix" else 1.2, label=LABELS[impl])
    counts = sorted({row.finetunes for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("fine-tunes", fontsize=9)
    panel.set_title(label, fontsize=10)
    tidy(panel)


def markdown(rows: Sequence[ServingRow]) -> str:
    """A line a number of fine-tunes: ms a decoded token of every row, in brackets times adamix."""
    parts = []
    for model, layers, prompt in dict.fromkeys((row.model, row.layers, row.prompt) for row in rows):
        some = [row for row in rows
                if (row.model, row.layers, row.prompt) == (model, layers, prompt)]
        ways = [impl for impl in STYLES if any(row.impl == impl for row in some)]
        lines = []
        for count in dict.fromkeys(row.finetunes for row in some):
            of = {row.impl: row for row in some if row.finetunes == count}
            own = of.get("adamix")
            lines.append([str(count), *(_cell(of.get(way), own) for way in ways),
                          f"{own.weights_gb:.1f}" if own and own.weights_gb is not None else ""])
        title = (f"{model}, {layers} layers, a row a fine-tune behind {prompt} tokens; ms a token "
                 f"of every row, in brackets times adamix ({some[0].device}, {some[0].commit}):")
        heading = ["fine-tunes", *(LABELS[way] for way in ways), "GB of weights"]
        parts.append(f"{title}\n\n{table(heading, lines)}")
    return "\n\n".join(parts) if parts else "no rows"


def _cell(row: ServingRow | None, own: ServingRow | None) -> str:
    if row is None or row.decode_ms is None:
        return ""
    text = f"{row.decode_ms:.2f}"
    if row is own or own is None or own.decode_ms is None:
        return text
    return f"{text} ({row.decode_ms / own.decode_ms:.2f}×)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=ROWS, help="another file of rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the picture")
    parser.add_argument("--table", action="store_true", help="print the table, no picture")
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
