"""Pictures and Markdown tables of the kernels, from the committed rows alone.

    python benchmarks/plot.py                       # pictures into benchmarks/results
    python benchmarks/plot.py --table               # the README's tables
    python benchmarks/plot.py --csv rows.csv --out pictures
"""

from __future__ import annotations

import argparse
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
PREFILL_TOKENS = (128, 512)


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
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(1.5 + 3.2 * columns, 1.4 + 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, shape in zip(panels, shapes, strict=False):
        _models_panel(panel, shape, [row for row in single if row.shape == shape])
    for panel in panels[len(shapes):]:
        panel.set_axis_off()
    handles: dict[str, object] = {}
    for panel in panels[: len(shapes)]:
        handles |= {label: handle for handle, label in
                    zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=9)
    figure.suptitle(f"Time of one call, one token a model ({device_of(single)})", fontsize=11)
    return figure


def _models_panel(panel: Axes, shape: str, rows: Sequence[Row]) -> None:
    for impl, (color, marker) in STYLES.items():
        points = sorted((row.models or 0, row.us or 0.0) for row in rows if row.impl == impl)
        if points:
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4,
                       linewidth=2 if impl == "adamix" else 1.2, label=LABELS[impl])
    models = sorted({row.models or 0 for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(models, [str(count) for count in models])
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    panel.set_title(shape.replace("x", " × "), fontsize=10)
    panel.set_xlabel("models", fontsize=9)
    panel.set_ylabel("µs", fontsize=9)
    tidy(panel)


# --- (b) roofline ------------------------------------------------------------------------------


def roofline_figure(rows: Sequence[Row]) -> Figure | None:
    """adamix at every number of tokens, under what copy and matrix product reach."""
    points = [row for row in measured(rows, "delta_gemm") if row.impl == "adamix"]
    if not points:
        return None
    last = points[-1]
    copy, peak = last.copy_gb_per_s or 0.0, last.roof_tflop_per_s or 0.0
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    panel = figure.subplots()
    intensities = [row.flops / row.bytes for row in points if row.flops and row.bytes]
    ridge = peak * 1e3 / copy
    ends = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 4]
    panel.plot(ends, [min(peak, copy * at / 1e3) for at in ends], color=INK, linewidth=1.5)
    middle = (ends[0] * ridge) ** 0.5
    panel.annotate(f"copy: {copy / 1e3:.2f} TB/s", (middle, copy * middle / 1e3), fontsize=9,
                   xytext=(-8, 6), textcoords="offset points", ha="right")
    panel.annotate(f"matrix product: {peak:.0f} TFLOP/s", (ends[2], peak), fontsize=9,
                   xytext=(0, 5), textcoords="offset points", ha="right")
    colors = [color for color, _ in STYLES.values()]
    for (tokens, marker), color in zip(ROOFLINE_TOKENS.items(), colors, strict=False):
        some = [row for row in points if row.tokens == tokens and row.flops and row.bytes]
        if some:
            panel.scatter([(row.flops or 0) / (row.bytes or 1) for row in some],
                          [row.tflop_per_s or 0 for row in some], marker=marker, s=22,
                          color=color, alpha=0.85, linewidths=0,
                          label=f"{tokens} token{'s' * (tokens > 1)} a model")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("operations per byte that must move")
    panel.set_ylabel("TFLOP/s")
    panel.set_title(f"delta_gemm under the roof ({device_of(points)})", fontsize=11)
    panel.legend(frameon=False, fontsize=9, loc="lower right")
    tidy(panel)
    return figure


# --- (c) prefill -------------------------------------------------------------------------------


def prefill_figure(rows: Sequence[Row]) -> Figure | None:
    """Time of the delta over the time of the base GEMM that it comes on top of."""
    found = latest(measured(rows, "delta_gemm"))
    bars: dict[int, list[tuple[str, int, float]]] = {}
    for key, row in found.items():
        base = found.get((*key[:-1], "base GEMM"))
        if row.impl == "adamix" and row.tokens in PREFILL_TOKENS and base and base.us and row.us:
            bars.setdefault(row.tokens, []).append((row.shape, row.models or 0, row.us / base.us))
    if not bars:
        return None
    most = max(len(some) for some in bars.values())
    figure = Figure(figsize=(5.2 * len(bars), 1.3 + 0.24 * most), layout="constrained")
    for panel, tokens in zip(figure.subplots(1, len(bars), squeeze=False)[0], sorted(bars),
                             strict=True):
        order = shapes_of(list(found.values()))
        some = sorted(bars[tokens], key=lambda bar: (order.index(bar[0]), bar[1]))
        _prefill_panel(panel, tokens, some)
    figure.suptitle("Time of delta_gemm over the base GEMM that it comes on top of "
                    f"({device_of(list(found.values()))})", fontsize=11)
    return figure


def _prefill_panel(panel: Axes, tokens: int, bars: Sequence[tuple[str, int, float]]) -> None:
    places = range(len(bars))
    drawn = panel.barh(places, [ratio for *_, ratio in bars], color=STYLES["adamix"][0])
    panel.bar_label(drawn, [f"{ratio:.2f}" for *_, ratio in bars], fontsize=8,
                    label_type="center", color="white")
    panel.set_yticks(places, [f"{shape.replace('x', ' × ')}, {models} model{'s' * (models > 1)}"
                              for shape, models, _ in bars])
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.axvline(1.0, color=INK, linewidth=1, linestyle="--")
    panel.set_title(f"{tokens} tokens a model", fontsize=10)
    panel.set_xlabel("ratio", fontsize=9)
    tidy(panel)


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
           "delta_gemm_prefill.png": prefill_figure}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, nargs="+", help="other files of rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures")
    parser.add_argument("--table", action="store_true", help="print Markdown tables, no pictures")
    args = parser.parse_args()
    files = args.csv or [TABLE_ROWS] + [SWEEP_ROWS] * (SWEEP_ROWS.exists() and not args.table)
    rows = list(latest(read_rows(files)).values())
    if args.table:
        print(markdown(rows))
        return
    for path in draw([row for row in rows if row.op != CEILING], args.out):
        print(path)


if __name__ == "__main__":
    main()
