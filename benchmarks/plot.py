"""Pictures and Markdown tables of the kernels, from the committed rows alone.

    python benchmarks/plot.py                       # pictures into benchmarks/results
    python benchmarks/plot.py --table               # the README's tables
    python benchmarks/plot.py --csv rows.csv --out pictures
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from rows import CEILING, Row, latest, read_rows
from tables import markdown

RESULTS = Path(__file__).resolve().parent / "results"
TABLE_ROWS = RESULTS / "kernels.csv"  # what the README's tables show
SWEEP_ROWS = RESULTS / "kernels_sweep.csv"  # and, beside it, the pictures
DPI = 160
INK, FAINT = "#1a1a1a", "#d9d9d9"
# Okabe and Ito's colours, told apart by colour-blind readers too; markers differ as well.
STYLES = {"adamix": ("#0072b2", "o"), "full weights": ("#d55e00", "s"),
          "low rank": ("#009e73", "^"), "base GEMM": ("#7f7f7f", "x"),
          "PyTorch unpack": ("#cc79a7", "D"), "one-bit Triton": ("#e69f00", "v")}
LABELS = {"adamix": "adamix delta_gemm", "full weights": "full 16-bit weights (bmm)",
          "low rank": "16-bit low rank, same bytes", "base GEMM": "base GEMM alone",
          "PyTorch unpack": "the same delta in plain PyTorch", "one-bit Triton": "one-bit, Triton"}
ROOFLINE_TOKENS = {1: "o", 4: "v", 16: "^", 128: "s", 512: "D"}
ROOFLINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7")
MODEL_STYLES = {1: ("#56b4e9", "o"), 8: ("#e69f00", "s"), 12: ("#000000", "D"),
                32: ("#d55e00", "^")}


def measured(rows: Sequence[Row], op: str) -> list[Row]:
    return [row for row in rows if row.op == op and row.us is not None]


def shapes_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.shape for row in rows))


# --- (a) time against the number of models -----------------------------------------------------


def models_figure(rows: Sequence[Row]) -> Figure | None:
    """One token a model, a panel a shape with three numbers of models or more."""
    single = [row for row in measured(rows, "delta_gemm") if row.tokens == 1]
    shapes = [shape for shape in shapes_of(single)
              if len({row.models for row in single
                      if row.shape == shape and row.impl == "adamix"}) > 2]
    if not shapes:
        return None
    figure, panels = grid_of(len(shapes))
    for panel, shape in zip(panels, shapes, strict=True):
        _models_panel(panel, shape, [row for row in single if row.shape == shape])
    _legend(figure, panels)
    figure.suptitle(f"Time of one call, one token a model ({device_of(single)}; lower is better)",
                    fontsize=11)
    return figure


def _models_panel(panel: Axes, shape: str, rows: Sequence[Row]) -> None:
    for impl, (color, marker) in STYLES.items():
        points = sorted((row.models or 0, row.us or 0.0) for row in rows if row.impl == impl)
        if points:
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4,
                       linewidth=2 if impl == "adamix" else 1.2, label=LABELS[impl])
    own = sorted((row.models or 0, (row.bytes or 0.0) / (row.copy_gb_per_s or 1.0) / 1e3)
                 for row in rows if row.impl == "adamix" and row.bytes and row.copy_gb_per_s)
    if own:
        panel.plot(*zip(*own, strict=True), color=INK, linewidth=1.2, linestyle=":",
                   label="adamix's bytes at the copy's rate")
    models = sorted({row.models or 0 for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(models, [str(count) for count in models])
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    panel.set_title(shape_title(shape), fontsize=10)
    label_axes(panel, "models", "µs a call")
    tidy(panel)


# --- (b) roofline ------------------------------------------------------------------------------


def roofline_figure(rows: Sequence[Row]) -> Figure | None:
    """adamix at every number of tokens, under what copy and matrix product reach."""
    points = [row for row in measured(rows, "delta_gemm")
              if row.impl == "adamix" and row.flops and row.bytes]
    if not points:
        return None
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    panel = figure.subplots()
    _roof(panel, points)
    for (tokens, marker), color in zip(ROOFLINE_TOKENS.items(), ROOFLINE_COLORS, strict=True):
        some = [row for row in points if row.tokens == tokens]
        if some:
            panel.scatter([intensity(row) for row in some], [row.tflop_per_s or 0 for row in some],
                          s=[marker_area(row) for row in some], marker=marker, color=color,
                          alpha=0.8, linewidths=0,
                          label=f"{tokens} token{'s' * (tokens > 1)} a model")
    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    label_axes(panel, "FLOP per byte that must move", "TFLOP/s (higher is better)")
    panel.set_title(f"delta_gemm under the device's roof ({device_of(points)})", fontsize=11)
    panel.legend(frameon=False, fontsize=9, loc="lower right", title_fontsize=9,
                 title="larger markers: more models")
    tidy(panel)
    return figure


def _roof(panel: Axes, points: Sequence[Row]) -> None:
    """The copy's slope and the matrix product's level, both with their rates."""
    copy, peak = points[-1].copy_gb_per_s or 0.0, points[-1].roof_tflop_per_s or 0.0
    ridge = peak * 1e3 / copy
    reached = [intensity(row) for row in points]
    left, right = min(*reached, ridge) / 2, max(*reached, ridge) * 2
    panel.plot([left, ridge, right], [copy * left / 1e3, peak, peak], color=INK, linewidth=1.5)
    middle = (left * ridge) ** 0.5
    panel.annotate(f"copy: {copy / 1e3:.2f} TB/s", (middle, copy * middle / 1e3), fontsize=9,
                   xytext=(-10, 4), textcoords="offset points", ha="right")
    panel.annotate(f"matrix product: {peak:.0f} TFLOP/s", (right, peak), fontsize=9,
                   xytext=(0, 5), textcoords="offset points", ha="right")


def intensity(row: Row) -> float:
    return (row.flops or 0.0) / (row.bytes or 1.0)


def marker_area(row: Row) -> float:
    """In points², more for more models: 12 for one, 84 for 64."""
    return 12 * (1 + math.log2(row.models or 1))


# --- (c) tokens --------------------------------------------------------------------------------


def tokens_figure(rows: Sequence[Row]) -> Figure | None:
    """Time of the delta over that of the base GEMM that it comes on top of, by tokens a model."""
    found = latest(measured(rows, "delta_gemm"))
    points: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for key, row in found.items():
        base = found.get((*key[:-1], "base GEMM"))
        if (row.impl == "adamix" and row.models in MODEL_STYLES and "+" not in row.shape
                and base and base.us and row.us):
            of_models = points.setdefault(row.shape, {}).setdefault(row.models or 0, [])
            of_models.append((row.tokens or 0, row.us / base.us))
    shown = {shape: lines for shape, lines in points.items()
             if {tokens for line in lines.values() for tokens, _ in line} - {1}}
    if not shown:
        return None
    figure, panels = grid_of(len(shown))
    for panel, (shape, lines) in zip(panels, shown.items(), strict=True):
        _tokens_panel(panel, shape, lines)
    _legend(figure, panels)
    figure.suptitle("Time of delta_gemm over the base GEMM that it comes on top of "
                    f"({device_of(list(found.values()))}; lower is better)", fontsize=11)
    return figure


def _tokens_panel(panel: Axes, shape: str, lines: dict[int, list[tuple[int, float]]]) -> None:
    panel.axhline(1.0, color=INK, linewidth=1.2, linestyle="--",
                  label="as long as the base GEMM")
    for models, (color, marker) in MODEL_STYLES.items():
        if models in lines:
            panel.plot(*zip(*sorted(lines[models]), strict=True), color=color, marker=marker,
                       markersize=5, linewidth=1.5, label=f"{models} model{'s' * (models > 1)}")
    tokens = sorted({tokens for line in lines.values() for tokens, _ in line})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(tokens, [str(count) for count in tokens])
    most = max(y for line in lines.values() for _, y in line)
    panel.set_ylim(0.25, 2.0 ** max(1, math.ceil(math.log2(1.1 * most))))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    panel.set_title(shape_title(shape), fontsize=10)
    label_axes(panel, "tokens a model", "adamix / base GEMM")
    tidy(panel)


# --- what the pictures share -------------------------------------------------------------------


def grid_of(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, at most four in a line."""
    columns = min(4, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(1.5 + 3.2 * columns, 1.6 + 3.0 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, list(panels[:count])


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One under all panels, with the entries of each."""
    handles: dict[str, object] = {}
    for panel in panels:
        handles |= {label: handle for handle, label in
                    zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center",
                  ncols=len(handles) if len(handles) < 6 else 4, frameon=False, fontsize=9)


def shape_title(shape: str) -> str:
    return f"{shape.replace('x', ' × ')} (in × out)"


def label_axes(panel: Axes, x: str, y: str) -> None:
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)


def tidy(panel: Axes) -> None:
    """A light grid and no frame."""
    panel.grid(True, which="major", color=FAINT, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.minorticks_off()
    panel.tick_params(labelsize=8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def device_of(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row.device for row in rows))


FIGURES = {"delta_gemm_models.png": models_figure, "delta_gemm_roofline.png": roofline_figure,
           "delta_gemm_tokens.png": tokens_figure}


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """The pictures that these rows suffice for, written as PNG files."""
    written = []
    for name, make in FIGURES.items():
        figure = make(rows)
        if figure is None:
            print(f"{name}: no rows for it")
            continue
        out.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_figure(out / name, dpi=DPI)
        written.append(out / name)
    return written


def table_rows() -> list[Row]:
    """The rows of the README's tables; rivals that their suite leaves out are the sweep's."""
    rows = read_rows([TABLE_ROWS])
    cases = {row.key[:-1] for row in rows if row.tokens == 1}
    sweep = [row for row in read_rows([SWEEP_ROWS]) if row.key[:-1] in cases]
    return [*sweep, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, nargs="+", help="other files of rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures")
    parser.add_argument("--table", action="store_true", help="print Markdown tables, no pictures")
    args = parser.parse_args()
    if args.table:
        print(markdown(read_rows(args.csv) if args.csv else table_rows()))
        return
    rows = read_rows(args.csv or [SWEEP_ROWS, TABLE_ROWS])
    for path in draw([row for row in latest(rows).values() if row.op != CEILING], args.out):
        print(path)


if __name__ == "__main__":
    main()
