"""The picture of bench_accuracy.py's rows: what each method's bytes leave between the model that it
gives back and the fine-tune.

    python benchmarks/plot_accuracy.py      # into benchmarks/results
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from accuracy_tables import ROWS
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from plot import DPI, label_axes, tidy
from plot_methods import STYLES
from rows import AccuracyRow, read_rows

PICTURE = "accuracy.png"
NAMES = ("adamix", "AdaMix, published", "AdaMix, no correction", "Delta-CoMe", "Top-2", "Top-32",
         "low rank, 16-bit", "ImPart", "Delta-DCT", "UltraDelta", "DeltaDQ", "BitDelta, distilled")
ALIKE = {"adamix": "this project", "BitDelta, distilled": "BitDelta"}  # as STYLES calls them
TITLES = {("examples", ""): "examples/", ("smollm2-135m", "invented"): "SmolLM2-135M, new rules",
          ("smollm2-135m", "reading"): "SmolLM2-135M, reading"}

Points = dict[float, list[float]]  # by ratio, those of the seeds


def divergences(rows: Iterable[AccuracyRow]) -> dict[tuple[str, str], dict[str, Points]]:
    """KL on prompts by pair, method and ratio."""
    found: dict[tuple[str, str], dict[str, Points]] = {}
    for row in rows:
        if row.ratio is not None and row.kl_prompts is not None and row.method in NAMES:
            pair = found.setdefault((row.model, row.family), {})
            pair.setdefault(row.method, {}).setdefault(row.ratio, []).append(row.kl_prompts)
    return found


def figure_of(rows: Sequence[AccuracyRow]) -> Figure:
    """A panel a pair."""
    found = divergences(rows)
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    every = [kl for methods in found.values() for points in methods.values()
             for seeds in points.values() for kl in seeds]
    for panel, (pair, methods) in zip(panels, found.items(), strict=True):
        draw(panel, methods)
        panel.set_ylim(min(every) / 1.3, max(every) * 1.3)
        panel.set_title(TITLES.get(pair, " ".join(pair)), fontsize=10)
        label_axes(panel, "bytes of the fine-tune, everything counted",
                   "KL from the fine-tune on held-out prompts" if panel is panels[0] else "")
        tidy(panel)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle("How far a compressed fine-tune is from the fine-tune, in nats a token "
                    "(lower is better)", fontsize=11)
    return figure


def draw(panel: Axes, methods: dict[str, Points]) -> None:
    for name in NAMES:
        color, marker, line = STYLES[ALIKE.get(name, name)]
        points = [(ratio, statistics.mean(seeds)) for ratio, seeds in
                  sorted(methods.get(name, {}).items())]
        if points:
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line,
                       markersize=5 if line else 8, linewidth=2.2 if name == "adamix" else 1.2,
                       zorder=3 if name == "adamix" else 2, label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"1/{ratio:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, default=ROWS.parent, help="folder of the picture")
    args = parser.parse_args()
    rows = read_rows([args.csv], AccuracyRow)
    FigureCanvasAgg(figure_of(rows)).print_figure(args.out / PICTURE, dpi=DPI)
    print(args.out / PICTURE)


if __name__ == "__main__":
    main()
