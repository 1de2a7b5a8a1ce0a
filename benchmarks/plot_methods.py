"""The picture of bench_methods.py's rows: error against bits a weight, for every method.

    python benchmarks/plot_methods.py       # into benchmarks/results
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from method_tables import ROWS, Mean, means, read
from plot import DPI, label_axes, tidy
from rows import MethodRow

PICTURE = "methods.png"
# Okabe and Ito's colours; what is related shares one and differs in line or marker.
STYLES = {
    "this project": ("#0072b2", "o", "-"), "this project, preset paper": ("#0072b2", "s", "--"),
    "AdaMix, published": ("#d55e00", "o", "-"), "AdaMix, no correction": ("#d55e00", "s", "--"),
    "Delta-CoMe": ("#009e73", "^", "-"), "Top-2": ("#009e73", "v", "--"),
    "Top-32": ("#009e73", "D", ":"), "low rank, 16-bit": ("#7f7f7f", "o", "-"),
    "ImPart": ("#7f7f7f", "s", "--"), "Delta-DCT": ("#cc79a7", "^", "-"),
    "UltraDelta": ("#e69f00", "v", "-"), "DeltaDQ": ("#e69f00", "^", "--"),
    "BitDelta": ("#000000", "*", ""),
    "GPTQ of ΔW, 1 bit": ("#000000", "P", ""), "GPTQ of ΔW, 2 bits": ("#000000", "X", "")}
PANELS = {"calibration inputs": "calibration", "held-out inputs": "held_out"}


def figure_of(rows: Sequence[MethodRow]) -> Figure:
    """A panel for the inputs that calibrated, one for those held out."""
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    found = means(rows)
    errors = [error for mean in found.values() for error in (mean.calibration, mean.held_out)]
    for panel, (title, error) in zip(panels, PANELS.items(), strict=True):
        draw(panel, found, error)
        panel.set_ylim(min(errors) / 1.3, max(errors) * 1.3)
        panel.set_title(title, fontsize=10)
        label_axes(panel, "bits a weight, everything counted",
                   "relative output error" if panel is panels[0] else "")
        tidy(panel)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    count = max(mean.matrices for mean in found.values())
    figure.suptitle(f"Mean error of {count} matrices of a real fine-tune (lower is better)",
                    fontsize=11)
    return figure


def draw(panel: Axes, found: Mapping[tuple[str, float | None], Mean], error: str) -> None:
    for method, (color, marker, line) in STYLES.items():
        points = sorted((mean.bits, getattr(mean, error)) for (name, _), mean in found.items()
                        if name == method)
        if points:
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line,
                       markersize=5 if line else 8, linewidth=1.4, label=method)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:g}"))
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, default=ROWS.parent, help="folder of the picture")
    args = parser.parse_args()
    FigureCanvasAgg(figure_of(read(args.csv))).print_figure(args.out / PICTURE, dpi=DPI)
    print(args.out / PICTURE)


if __name__ == "__main__":
    main()
