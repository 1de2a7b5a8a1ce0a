"""Pictures of a delta: where the bits go, and why (after the paper's Figures 4 and 2)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from adamix import ops
from adamix.artifacts import ModelDelta, PackedDelta
from adamix.errors import DeltaFileError
from adamix.naming import index_of, kind_of
from adamix.storage.file import read_delta
from adamix.storage.log import Spectrum, read_spectra

PIXELS = 1600  # width of a picture
DPI = 160
INCHES = PIXELS / DPI
INK, FAINT = "#1a1a1a", "#d9d9d9"
CURVE = "#c0392b"  # the singular values, apart from the widths' scale
ALLOCATION_FILE, SPECTRUM_FILE = "bits_by_layer.png", "singular_values.png"
# The order in which a layer uses its weights; other kinds follow in the file's own order.
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
         "embed_tokens", "lm_head")
TITLES = {"q_proj": "attention query (q)", "k_proj": "attention key (k)",
          "v_proj": "attention value (v)", "o_proj": "attention output (o)",
          "gate_proj": "MLP gate", "up_proj": "MLP up", "down_proj": "MLP down",
          "embed_tokens": "token embedding", "lm_head": "output head"}


def plot_delta(folder: str | Path, out: str | Path, *, matrix: str | None = None) -> list[Path]:
    """Draw a delta folder's pictures.

    Args:
        folder: the delta.
        out: a `.png` for the bits by layer alone, else a folder for both pictures.
        matrix: whose singular values to show; default: the last layer's query projection.

    Returns:
        The files written; singular values only where the folder has spectra.safetensors.

    Raises:
        DeltaFileError: the folder is no delta, or has no such matrix.
    """
    folder, out = Path(folder), Path(out)
    allocation = allocation_figure(read_delta(folder))
    if out.suffix.lower() == ".png":
        return [_save(allocation, out)]
    written = [_save(allocation, out / ALLOCATION_FILE)]
    spectra = read_spectra(folder)
    if matrix is not None and matrix not in spectra:
        raise DeltaFileError(f"{folder} has no singular values of {matrix}")
    if spectra:
        name = matrix or default_matrix(list(spectra))
        written.append(_save(spectrum_figure(name, spectra[name]), out / SPECTRUM_FILE))
    return written


def default_matrix(names: Sequence[str]) -> str:
    """The last layer's query projection, or the last matrix where there is none."""
    queries = [name for name in names if "q_proj" in name]
    return max(queries or names, key=index_of)


def width_bytes(packed: PackedDelta) -> dict[int, int]:
    """{bits: bytes of the lanes at that width}, V's and U's; a scale goes with its row of V."""
    out_features, in_features = packed.shape
    sizes: Counter[int] = Counter()
    for bits, count in packed.v_widths.items():
        sizes[bits] += 4 * count * (ops.lane_words(in_features, bits) + 1)
    for bits, count in packed.u_widths.items():
        sizes[bits] += 4 * count * ops.lane_words(out_features, bits)
    return dict(sizes)


def allocation_figure(delta: ModelDelta) -> Figure:
    """One panel a weight type: the bytes that each layer spends at each width."""
    panels = _panels(delta)
    widths = sorted({b for packed in delta.matrices.values() for b in width_bytes(packed)},
                    reverse=True)
    columns = min(3, max(len(panels), 1))
    rows = max(math.ceil(len(panels) / columns), 1)
    height = 2.0 + 1.85 * rows
    figure = _figure(height)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, layers) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, title, layers, widths)
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.62 / height, top=1 - 1.62 / height,
                           wspace=0.24, hspace=0.62)
    _headline(figure, height, "Where the bits go", [
        "Each fine-tuned weight is base + U·diag(s)·V. A component (one column of U with one row "
        "of V, a width each) with a large singular",
        "value s gets more bits, a small one few or none: an integer program picks the widths so "
        "that the output error is least for the bytes."])
    handles = [Patch(facecolor=width_colour(b), edgecolor="white", label=f"{b} bit{'s' * (b > 1)}")
               for b in widths]
    figure.legend(handles=handles, loc="upper left", ncols=max(len(widths), 1), frameon=False,
                  bbox_to_anchor=(0.062, 1 - 0.92 / height), handlelength=1.2, columnspacing=1.4,
                  fontsize=9, title=None)
    return figure


def _panels(delta: ModelDelta) -> dict[str, dict[int | None, dict[int, int]]]:
    """{title: {layer: {bits: bytes}}}, panels in the order in which a layer uses its weights."""
    kinds: dict[str, dict[int | None, dict[int, int]]] = {}
    for name, packed in delta.matrices.items():
        index = index_of(name)
        layers = kinds.setdefault(kind_of(name), {})
        sizes = layers.setdefault(index[0] if index else None, {})
        for bits, size in width_bytes(packed).items():
            sizes[bits] = sizes.get(bits, 0) + size  # experts of one layer add up

    def rank(kind: str) -> int:
        return next((i for i, word in enumerate(ORDER) if word in kind), len(ORDER))

    return {_title(kind): dict(sorted(kinds[kind].items(), key=lambda item: item[0] or 0))
            for kind in sorted(kinds, key=rank)}


def _title(kind: str) -> str:
    known = next((TITLES[word] for word in ORDER if kind.endswith(f"{word}.weight")), None)
    return known if known and kind.count("*") <= 1 else kind.removesuffix(".weight")


def _draw_panel(axis: Axes, title: str, layers: dict[int | None, dict[int, int]],
                widths: list[int]) -> None:
    """Stacked bars, the widest lanes at the bottom."""
    most = max((sum(sizes.values()) for sizes in layers.values()), default=0)
    unit, scale = ("MiB", 2**20) if most >= 2**20 else ("KiB", 2**10)
    positions = [0 if layer is None else layer for layer in layers]
    base = [0.0] * len(positions)
    for bits in widths:
        heights = [sizes.get(bits, 0) / scale for sizes in layers.values()]
        axis.bar(positions, heights, 0.86, bottom=base, color=width_colour(bits), linewidth=0)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    single = set(layers) == {None}
    axis.set_title(title, fontsize=9.5, loc="left", color=INK, pad=4)
    axis.set_ylabel(unit, fontsize=8)
    axis.set_xlabel("one matrix" if single else "layer", fontsize=8, labelpad=2)
    _tidy(axis)
    if single:
        axis.set_xlim(-2.2, 2.2)
        axis.set_xticks([])
    else:
        axis.set_xlim(min(positions) - 0.7, max(positions) + 0.7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def spectrum_figure(name: str, spectrum: Spectrum) -> Figure:
    """Left: singular values fall over orders of magnitude, the share of a component that a width
    loses does not. Right: that share by width."""
    energy, shares = lost_shares(spectrum)
    height = 4.9
    figure = _figure(height)
    left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
    ranks = torch.arange(1, len(energy) + 1)
    for k, bits in enumerate(spectrum.widths):
        share = shares[:, k]
        left.plot(ranks, share / share.min(), color=width_colour(bits), linewidth=1.1)
    values = energy.sqrt()
    left.plot(ranks, values / values.min(), color=CURVE, linewidth=2.2)
    left.set_yscale("log")
    left.set_xlim(1, max(len(energy), 2))
    left.set_xlabel("rank index of the component", fontsize=9)
    left.set_ylabel("relative to the curve's smallest value", fontsize=9)
    left.set_title("How components differ", fontsize=10,
                   loc="left", color=INK)
    handles = [Patch(facecolor=CURVE, label="singular value")]
    handles += [Patch(facecolor=width_colour(b), label=f"error share, {b} bit{'s' * (b > 1)}")
                for b in spectrum.widths]
    left.legend(handles=handles, fontsize=8, ncols=2, loc="upper right", handlelength=1.2,
                facecolor="white", edgecolor="none", framealpha=0.9)
    _draw_shares(right, shares.mean(dim=0), spectrum.widths)
    for axis in (left, right):
        _tidy(axis)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.56 / height, top=1 - 1.32 / height,
                           wspace=0.22)
    _headline(figure, height, "Why large components get more bits", [
        f"{name.removesuffix('.weight')}: the error of a component is its energy (its singular "
        "value squared) times the share that its width loses.",
        "The energy falls over orders of magnitude, the share depends mostly on the width: a bit "
        "is worth most on the largest components."])
    return figure


def lost_shares(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """Energy of each component in the output `[candidates]`, and the share of it that each width
    loses `[candidates, widths]`, both fp64; components without energy are left out."""
    errors = spectrum.errors.double()
    energy = errors[:, -1]
    kept = energy > 0
    return energy[kept], (errors[kept, :-1] / energy[kept, None]).clamp_min(1e-12)


def _draw_shares(axis: Axes, means: Tensor, widths: tuple[int, ...]) -> None:
    order = sorted(range(len(widths)), key=lambda k: widths[k])
    values = [means[k].item() for k in order]
    axis.bar(range(len(order)), values, 0.8, color=[width_colour(widths[k]) for k in order])
    axis.set_yscale("log")
    axis.set_ylim(min(values) / 3, max(values) * 4)
    for x, value in enumerate(values):
        axis.annotate(_percent(value), (x, value), (0, 2), textcoords="offset points", ha="center",
                      va="bottom", fontsize=8, color=INK)
    axis.set_xticks(range(len(order)), [str(widths[k]) for k in order])
    axis.set_xlabel("bits of the component", fontsize=9)
    axis.set_ylabel("share of its energy lost (mean)", fontsize=9)
    axis.set_title("What each width loses", fontsize=10, loc="left", color=INK)


def _percent(share: float) -> str:
    if share < 1e-3:
        return f"{100 * share:.1g} %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def width_colour(bits: int) -> tuple[float, float, float, float]:
    """Dark for many bits, light for few; viridis, which the colour-blind can order too."""
    return colormaps["viridis"](0.93 - 0.9 * (bits - 1) / (ops.MAX_BITS - 1))


def _figure(height: float) -> Figure:
    """A figure of its own, without pyplot's registry of all figures."""
    figure = Figure(figsize=(INCHES, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _headline(figure: Figure, height: float, title: str, lines: list[str]) -> None:
    figure.text(0.07, 1 - 0.16 / height, title, fontsize=14, weight="bold", va="top", color=INK)
    figure.text(0.07, 1 - 0.48 / height, "\n".join(lines), fontsize=9, va="top", color=INK,
                linespacing=1.35)


def _tidy(axis: Axes) -> None:
    axis.tick_params(labelsize=8, colors=INK, length=3)
    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
