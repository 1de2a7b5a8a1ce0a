"""The README's figures are those of the rows in benchmarks/results."""

import csv
import importlib
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
accuracy_tables, compression_tables, plot, plot_serving, rows, tables = map(
    importlib.import_module, ("accuracy_tables", "compression_tables", "plot", "plot_serving",
                              "rows", "tables"))

README = (ROOT / "README.md").read_text()
MEASURED = (plot.SWEEP_ROWS, plot.TABLE_ROWS, plot_serving.ROWS, compression_tables.ROWS,
            accuracy_tables.ROWS, accuracy_tables.WRITERS)


def kernels():
    return list(rows.latest(rows.read_rows([plot.SWEEP_ROWS, plot.TABLE_ROWS])).values())


def serving():
    return plot_serving.latest(rows.read_rows([plot_serving.ROWS], rows.ServingRow))


def compressions():
    return rows.read_rows([compression_tables.ROWS], rows.CompressionRow)


@pytest.mark.parametrize(("command", "text"), [
    ("compression_tables.py", compression_tables.markdown(compressions())),
    ("plot.py", tables.markdown(plot.table_rows())),
    ("plot_serving.py", plot_serving.markdown(serving()))])
def test_the_readme_has_the_tables_of_the_rows(command, text):
    assert re.search(rf"python benchmarks/{command} (--table )? *#", README)
    assert f"\n\n{text}\n\n" in README, f"paste what benchmarks/{command} --table prints"


def test_the_page_on_quality_has_the_tables_of_the_rows_of_accuracy():
    text = accuracy_tables.markdown(rows.read_rows([accuracy_tables.ROWS], rows.AccuracyRow))
    page = (ROOT / "benchmarks" / "QUALITY.md").read_text()
    assert f"\n\n{text}\n\n" in page, "paste what benchmarks/bench_accuracy.py --table prints"


def test_the_page_on_quality_has_the_rows_of_who_writes():
    page = (ROOT / "benchmarks" / "QUALITY.md").read_text()
    found = rows.read_rows([accuracy_tables.WRITERS], rows.AccuracyRow)
    assert len(found) == 8
    both = [row for row in rows.read_rows([accuracy_tables.ROWS], rows.AccuracyRow)
            if (row.method, row.seed) == ("adamix", 0) and row.family and row.ratio < 64]
    for row in (*found, *both):
        cells = (row.kl_prompts, row.kl_text, row.error, row.error_held_out)
        assert f"| {' | '.join(f'{cell:.4f}' for cell in cells)} |" in page, row


def test_what_the_text_says_of_whole_models_is_in_the_rows():
    seeds = defaultdict(list)
    for row in rows.read_rows([accuracy_tables.ROWS], rows.AccuracyRow):
        seeds[row.family, row.method, row.ratio].append(row)

    def mean(field, *key):
        return statistics.mean(getattr(row, field) for row in seeds[key])

    own = {"adamix", "adamix, tuned", "adamix, one budget", "paper", "LoRA"}
    below = defaultdict(list)
    for family, method, ratio in list(seeds):
        if method == "adamix":
            least = min(mean("kl_prompts", family, other, ratio) for of, other, at in seeds
                        if (of, at) == (family, ratio) and other not in own)
            share = 100 * (1 - mean("kl_prompts", family, method, ratio) / least)
            below[bool(family)].append(share)
    pairs, example = ([f"{ends(shares):.0f} %" for ends in (min, max)]
                      for shares in (below[True], below[False]))
    answers = {method: ", ".join(f"{mean('accuracy', 'invented', method, ratio):.1f}"
                                 for ratio in (16, 32, 64)) for method in ("adamix", "LoRA")}
    answers = {method: " and ".join(said.rsplit(", ", 1)) for method, said in answers.items()}
    said = " ".join(README.split())
    assert f"is {pairs[0]} to {pairs[1]} below that of the nearest published method" in said
    assert f"and {example[0]} to {example[1]} below it in `examples/`" in said
    assert f"at 1/16, 1/32 and 1/64 {answers['adamix']} %, and a LoRA" in said
    assert f"a LoRA of these bytes {answers['LoRA']} %" in said


def test_the_readme_has_the_pictures_and_they_are_there():
    shown = set(re.findall(r"!\[.*\]\((.*)\)", README))
    assert {f"benchmarks/results/{name}" for name in (*plot.FIGURES, plot_serving.PICTURE)} <= shown
    assert all((ROOT / name).is_file() for name in shown)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_every_row_says_where_it_is_from_and_no_folder(path):
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found
    for row in found:
        assert all(row[name] for name in ("device", "commit", "command", "date"))
        assert not any(re.search(r"(^|[\s=])\.*/", cell) for cell in row.values()), row


def test_what_the_text_says_of_serving_is_in_the_rows():
    of = {(row.layers, row.impl, row.finetunes): row for row in serving()}

    def ratio(layers, count, impl="separate models"):
        return of[layers, impl, count].decode_ms / of[layers, "adamix", count].decode_ms

    eight, separate = of[28, "adamix", 8], of[28, "separate models", 8]
    prefill = [of[28, "adamix", count].prefill_ms / of[28, "base", count].prefill_ms - 1
               for layers, impl, count in of if (layers, impl) == (28, "base")]
    for said in (
            f"{eight.decode_ms:.2f} ms and {plot_serving.memory_gb(eight):.1f} GB",
            f"{separate.decode_ms:.2f} ms and {separate.peak_gb:.1f} GB",
            f"takes {100 / ratio(28, 1, 'base') - 100:.1f} % longer than the base's",
            f"decoded {ratio(28, 8):.2f} times as fast",
            f"half the layers {ratio(14, 12):.2f} times",
            f"Prefill takes {100 * min(prefill):.0f} to {100 * max(prefill):.0f} % longer"):
        assert said in words(README), said
    assert f"served {ratio(28, 8):.2f} times as fast" in words((ROOT / "CHANGELOG.md").read_text())


def test_what_the_text_says_of_kernels_is_in_the_rows():
    of = {(row.shape, row.models, row.tokens, row.impl): row.us
          for row in plot.measured(kernels(), "delta_gemm")}
    own = [key[:-1] for key in of if key[-1] == "adamix"]
    over_base = [of[(*key, "adamix")] / of[(*key, "base GEMM")] for key in own
                 if key[2] in (4, 16, 128) and (*key, "base GEMM") in of]

    def of_base(shape):
        return of[shape, 1, 512, "adamix"] / of[shape, 1, 512, "base GEMM"]

    low_rank = [of[(*key, "low rank")] / of[(*key, "adamix")] for key in own
                if key[1] >= 16 and key[2] == 1 and (*key, "low rank") in of]
    for said in (
            f"takes {of['3584x3584', 1, 1, 'adamix']:.2f} µs (target 4)",
            f"take {of['4096x4096', 32, 1, 'adamix']:.1f} µs (target 30)",
            f"take {of['3584x3584', 1, 512, 'adamix']:.1f} µs on top of the base's "
            f"{of['3584x3584', 1, 512, 'base GEMM']:.1f} (",
            f"together take {of['3584x(3584+512+512)', 1, 1, 'adamix']:.2f} (target 4.5), gate and "
            f"up together {of['3584x(18944+18944)', 1, 1, 'adamix']:.1f} (",
            f"they take {of_base('3584x18944'):.2f} and {of_base('18944x3584'):.2f} of the base's",
            f"up to {max(over_base):.1f} times as long as the base GEMM",
            f"need {min(low_rank):.1f} to {max(low_rank):.1f} of its time"):
        assert said in words(README), said


def test_what_the_text_says_of_compressing_is_in_the_rows():
    found = compression_tables.runs(compressions(), "model")
    given = [run for run in found if not compression_tables.samples(run[-1])]
    of = {run[-1].processes: {row.stage: row.seconds for row in run} for run in given}
    (sampled,) = [{row.stage: row.seconds for row in run} for run in found if run not in given]
    one, two = of[1], of[2]
    inner = "calibration and compression"
    for said in (
            f"compressed in {one['whole']:.0f} seconds on one",
            f"compress {one['whole'] / two['whole']:.2f} times as fast as one (target 1.7), "
            f"{one[inner] / two[inner]:.2f} times without",
            f"sampling takes {sampled['calibration tokens']:.0f} seconds"):
        assert said in words(README), said
    assert len({run[-1].sha256 for run in given}) == 1 and given[0][-1].sha256
    assert max(run[-1].reserved_gb for run in found) < 24


def test_what_the_text_says_of_swaps_is_in_the_log():
    log = (plot.RESULTS / "swaps.txt").read_text()
    said = words(README)
    device, commit = re.search(r"^(.*), commit (\w+): bench_swaps.py", log).groups()
    assert f"`benchmarks/results/swaps.txt`; {device}, commit {commit}" in said
    tokens = int(re.search(r"^(\d+) tokens, 0 of them wrong; .* True$", log, re.M)[1])
    assert f"0 wrong tokens of {tokens:,}" in said
    assert re.search(r"^1000 swaps", log, re.M) and "1,000 swaps" in said
    assert ", 100 of them resident" in log and "100 fine-tunes resident" in said
    before, after = re.search(r"before ([\d,]+) bytes, after ([\d,]+)", log).groups()
    assert before == after and "the memory in use did not change" in said


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("make", [*plot.FIGURES.values(), plot_serving.figure_of],
                         ids=lambda make: make.__name__)
def test_no_text_leaves_a_picture_or_lies_on_another(make):
    texts_are_apart(make(serving() if make is plot_serving.figure_of else kernels()))


def texts_are_apart(figure):
    """No text leaves the picture or lies on another."""
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    boxes += [box for panel in figure.axes for box in text_boxes(panel)]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0, i
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, i
        assert not [other for other in boxes[i + 1:] if box.overlaps(other)], i


def text_boxes(panel):
    """Of title, axes' labels and ticks, of what is written into the panel, and of its legend."""
    low, high = panel.get_xlim(), panel.get_ylim()
    texts = [panel.title, panel.xaxis.label, panel.yaxis.label, *panel.texts]
    for axis, (least, most) in ((panel.xaxis, low), (panel.yaxis, high)):
        texts += [label for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(),
                                                strict=True) if least <= place <= most]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    return boxes + ([legend.get_window_extent()] if (legend := panel.get_legend()) else [])
