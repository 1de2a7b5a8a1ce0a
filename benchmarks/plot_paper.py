"""The paper's Figures 2 and 4 from bench_paper.py's rows.

    python benchmarks/bench_paper.py --rows benchmarks/results --plot
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from paper_rows import WIDTHS, ComponentRow, PlanRow
from paper_tables import read
from plot import DPI, label_axes, tidy
from rows import RowKind

from adamix.plots import CURVE, allocation_figure, width_colour

SHOWN = (2, 3, 8)  # bits, as in the paper's Figure 2


def draw(folder: Path) -> list[Path]:
    """A picture of each kind a model and family, written beside the rows."""
    written = []
    for kind, name, make in ((ComponentRow, "paper_components", components_figure),
                             (PlanRow, "paper_plan", plan_figure)):
        for title, rows in by_pair(read(folder, kind)).items():
            path = folder / f"{name}_{title}.png"
            FigureCanvasAgg(make(rows)).print_figure(path, dpi=DPI)
            written.append(path)
    return written


def by_pair(rows: Iterable[RowKind]) -> dict[str, list[RowKind]]:
    """The rows of each family, or model where there is none."""
    groups: dict[str, list[RowKind]] = {}
    for row in rows:
        groups.setdefault(row.family or row.model, []).append(row)
    return groups


def components_figure(rows: Sequence[ComponentRow]) -> Figure:
    """Figure 2. Left: singular value and quantization term by rank, each relative to its least.
    Right: the mean term by width."""
    rows = sorted(rows, key=lambda row: row.rank)
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    ranks = [row.rank for row in rows]
    for bits in SHOWN:
        terms = [getattr(row, f"bits_{bits}") for row in rows]
        relative(left, ranks, terms, width_colour(bits), f"quantization, {bits} bits")
    relative(left, ranks, [row.singular_value for row in rows], CURVE, "singular value", 2.2)
    left.set_yscale("log")
    label_axes(left, "rank index", "relative to the least of the curve")
    left.legend(fontsize=8, frameon=False)
    widths = sorted(WIDTHS)
    means = [sum(getattr(row, f"bits_{bits}") for row in rows) / len(rows) for bits in widths]
    right.bar(widths, means, 0.8, color=[width_colour(bits) for bits in widths])
    right.set_yscale("log")
    label_axes(right, "bits", "mean quantization term")
    for panel in (left, right):
        tidy(panel)
    where = ", ".join(filter(None, (rows[0].model, rows[0].family, rows[0].matrix)))
    figure.suptitle(f"What a width costs a component: {where}", fontsize=11)
    return figure


def relative(panel: Axes, ranks: Sequence[int], values: Sequence[float],
             colour: str | tuple[float, ...], label: str, width: float = 1.0) -> None:
    least = min(values)
    panel.plot(ranks, [value / least for value in values], color=colour, linewidth=width,
               label=label)


def plan_figure(rows: Sequence[PlanRow]) -> Figure:
    """Figure 4: bytes at each width across the layers, as `adamix inspect` draws them."""
    matrices = {}
    for row in rows:
        v_widths, u_widths = ({bits: count for bits in range(8, 0, -1)
                               if (count := getattr(row, f"{factor}_bits_{bits}"))}
                              for factor in "vu")
        matrices[row.matrix] = SimpleNamespace(shape=(row.out_features, row.in_features),
                                               v_widths=v_widths, u_widths=u_widths)
    return allocation_figure(SimpleNamespace(matrices=matrices))
