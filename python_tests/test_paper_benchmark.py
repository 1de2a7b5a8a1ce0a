"""bench_paper.py's arithmetic, on known numbers and on a tiny pair: no timings are judged."""

import importlib
import itertools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from test_results import texts_are_apart
from tiny_models import LAYERS, make_pair
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
bench, measures, few, tables, paper_rows, rows, plot, answers, accuracy = map(
    importlib.import_module, ("bench_paper", "paper_measures", "few_widths", "paper_tables",
                              "paper_rows", "rows", "plot_paper", "answers", "accuracy_tables"))
allocate = few.allocate


# --- few widths --------------------------------------------------------------------------------


def program(seed, rank=24, choices=5):
    """Errors that fall by about 4 a bit, components that fall too, costs as files have them."""
    random = torch.Generator().manual_seed(seed)
    energy = 0.8 ** torch.arange(rank, dtype=torch.float64)[:, None]
    lost = 0.25 ** torch.arange(choices - 1, 0, -1, dtype=torch.float64)
    noise = 1 + 0.2 * torch.rand(rank, choices - 1, generator=random, dtype=torch.float64)
    errors = torch.cat([energy * lost * noise, energy], dim=1)
    return errors, [*(96 * bits + 32 for bits in range(choices - 1, 0, -1)), 0], 96 * rank


def error_of(errors, plan):
    return errors.gather(1, plan[:, None]).sum().item()


@pytest.mark.parametrize("most", [2, 3, 4, None])
@pytest.mark.parametrize("seed", range(4))
def test_few_widths_are_as_good_as_the_integer_program_s(seed, most):
    errors, costs, budget = program(seed)
    plan = few.allocate_few(errors, costs, budget, max_choices=most)
    assert sum(costs[k] for k in plan) <= budget and len(plan.unique()) <= (most or 9)
    exact = error_of(errors, allocate(errors, costs, budget, max_choices=most))
    assert error_of(errors, plan) == pytest.approx(exact, rel=2e-6)


def test_a_set_of_widths_with_a_gap_is_solved_exactly():
    errors, _, _ = program(2, rank=20, choices=3)
    costs, budget = [193, 73, 0], 900  # 8 and 3 bits: a step is more than the narrower width
    found = allocate(errors, costs, budget)
    exact = allocate(errors, costs, budget, max_choices=3)
    assert error_of(errors, found) == pytest.approx(error_of(errors, exact), rel=2e-6)


def test_no_plan_of_a_set_is_below_its_bound_by_brute_force():
    errors, costs, _ = program(0, rank=5, choices=4)
    for budget in (300, 700, 1100):
        sets = list(itertools.combinations(range(4), 3))[1:]  # those with 0 bits
        for chosen, bound in zip(sets, few.lower_bounds(errors, costs, budget, sets), strict=True):
            least = min(error_of(errors, torch.tensor(plan))
                        for plan in itertools.product(chosen, repeat=5)
                        if sum(costs[k] for k in plan) <= budget)
            assert bound.item() <= least * (1 + 1e-9)


def test_most_sets_are_not_solved():
    errors, costs, budget = program(1)
    calls = []

    def solve(errors, costs, budget, **options):
        calls.append(options)
        return allocate(errors, costs, budget, **options)

    plan = few.allocate_few(errors, costs, budget, max_choices=3, solve=solve)
    assert error_of(errors, plan) == pytest.approx(
        error_of(errors, allocate(errors, costs, budget, max_choices=3)), rel=2e-6)
    assert 1 <= len(calls) <= 5  # of 10 sets


# --- errors of the outputs ---------------------------------------------------------------------


def test_the_largest_outputs_are_those_of_a_plain_loop():
    random = torch.Generator().manual_seed(0)
    X, delta, lost, W = (torch.randn(*shape, generator=random)
                         for shape in ((50, 6), (8, 6), (8, 6), (8, 6)))
    found = measures.output_errors(X, delta, 0.1 * lost, X @ W.T)
    entries = sorted(((abs(X[t] @ W[i]).item(), (X[t] @ delta[i]).item() ** 2,
                       (0.1 * X[t] @ lost[i]).item() ** 2)
                      for t in range(50) for i in range(8)), reverse=True)
    out = entries[:4]  # 1 % of 400
    for some, relative, square in ((entries, found.error_all, found.square_all),
                                   (out, found.error_out, found.square_out)):
        wanted, missed = (sum(entry[k] for entry in some) for k in (1, 2))
        assert relative == pytest.approx(missed / wanted, rel=1e-5)
        assert square == pytest.approx(missed / len(some), rel=1e-5)


def test_thirds_of_the_layers_are_the_papers():
    of = [measures.group_of(layer, 28) for layer in range(28)]
    assert of == ["low"] * 9 + ["mid"] * 9 + ["high"] * 10
    assert [measures.group_of(layer, 30) for layer in (9, 10, 19, 20, 29)] == [
        "low", "mid", "mid", "high", "high"]


def test_errors_of_a_group_are_of_its_layers_and_type():
    one = measures.OutputErrors(0.1, 0.2, 0.3, 0.4)
    names = [f"model.layers.{i}.mlp.{kind}" for i in range(4) for kind in ("up_proj", "down_proj")]
    got = [(group, kind, len(some)) for group, kind, some in
           measures.by_group(dict.fromkeys(names, one), 4)]
    assert got == [("low", "up_proj", 1), ("low", "down_proj", 1), ("mid", "up_proj", 1),
                   ("mid", "down_proj", 1), ("high", "up_proj", 2), ("high", "down_proj", 2)]


def test_half_a_delta_has_a_quarter_of_the_error_everywhere(tmp_path):
    base, reference, half = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                             for path in (*make_pair(tmp_path), tmp_path / "base"))
    for name, layer in answers.block_linears(half).items():
        other = reference.get_submodule(name).weight
        layer.weight.data = (layer.weight + other).detach() / 2
    found = measures.model_errors(reference, base, half, torch.arange(4, 100).view(4, 24))
    assert len(found) == 7 * LAYERS
    for error in found.values():
        assert error.error_all == pytest.approx(0.25, rel=1e-4)
        assert error.error_out == pytest.approx(0.25, rel=1e-4)
        assert error.square_all > 0 and not error.square_out == error.square_all


# --- seconds and components --------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    random = torch.Generator().manual_seed(0)
    delta = torch.randn(48, 64, generator=random) * 0.9 ** torch.arange(64)
    inputs = torch.randn(64, 200, generator=random)
    return delta, inputs @ inputs.T


def test_the_parts_of_the_time_sum_to_the_whole_and_the_product_is_left_as_it_was(case):
    before = (measures.matrix.decompose, measures.matrix.simulate, measures.matrix._quantize)
    took = measures.stage_seconds(*case, measures.adamix.Config(bits_per_weight=4))
    assert list(took) == [*measures.STAGES, "other", "whole"] == [
        "decomposition", "simulation", "optimization", "quantization", "other", "whole"]
    assert all(seconds > 0 for seconds in took.values())
    assert sum(took.values()) - took["whole"] == pytest.approx(took["whole"])
    assert before == (measures.matrix.decompose, measures.matrix.simulate,
                      measures.matrix._quantize)


def test_components_are_the_plain_svd_s_and_their_terms_are_equation_5_s(case):
    delta, gram = case
    values, terms = measures.components(delta, gram)
    exact = torch.linalg.svdvals(delta.double())
    assert values == pytest.approx(exact.tolist(), rel=1e-6)
    assert len(terms) == 48 and {len(row) for row in terms} == {len(paper_rows.WIDTHS)}
    H = measures.hessian(gram, 0.01)
    V = measures.decompose(delta, H, 48, plain=True).V[7:8]
    V_hat = measures.matrix.quantize_rows(V, torch.tensor([3], dtype=torch.int32), H).dequantize()
    lost = (V - V_hat)[0]
    assert terms[7][paper_rows.WIDTHS.index(3)] == pytest.approx((lost @ H.matrix @ lost).item())


def test_timed_layers_go_from_the_first_to_the_last():
    names = [f"layers.{i}.q_proj" for i in range(30)]
    assert bench.timed_layers(names, 3) == ["layers.0.q_proj", "layers.14.q_proj",
                                            "layers.29.q_proj"]
    assert bench.timed_layers(names, 1) == ["layers.0.q_proj"]
    assert bench.timed_layers(names, 99) == names


# --- a tiny pair -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The rows of a pair, all parts, measured twice: the second time nothing is."""
    made = tmp_path_factory.mktemp("paper")
    base, finetuned = make_pair(made)
    (finetuned / bench.RECORD).write_text(json.dumps({"family": "invented", "seed": 0}))
    arguments = ["--base", base, "--finetunes", finetuned, "--rows", made / "rows", "--ratio", 3,
                 "--widths", 2, 3, "none", "--published-widths", 2, 4, "--prompts", 4,
                 "--sequences", 8, "--length", 32, "--tokens", 64, "--timed-layers", 1,
                 "--solvers", 1, "--device", "cpu"]
    bench.main(list(map(str, arguments)))
    before = {path: path.read_bytes() for path in (made / "rows").iterdir()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bench.Compression, "compressed", None)
        bench.main(list(map(str, arguments)))
    assert before == {path: path.read_bytes() for path in (made / "rows").iterdir()}
    return made / "rows"


def test_every_method_has_a_row_of_widths_and_few_widths_have_more_error(folder):
    found = {row.method: row for row in tables.read(folder, rows.AccuracyRow)}
    assert list(found) == ["adamix, f_max 2", "adamix, f_max 3", "adamix, f_max none",
                           "AdaMix, published, f_max 2", "Delta-CoMe", "AdaMix, published"]
    errors = [found[f"adamix, f_max {most}"].error for most in (2, 3, "none")]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.05 * errors[-1]
    assert all(row.prompts == 4 and 0 < row.kl_text < math.inf for row in found.values())


def test_known_rows_are_taken_as_they_are(folder, tmp_path, monkeypatch):
    given = [row for row in tables.read(folder, rows.AccuracyRow) if row.method == "Delta-CoMe"]
    rows.append_row(tmp_path / "known.csv", given[0])
    monkeypatch.setattr(bench, "runs", lambda args, solve: [
        bench.Run("Delta-CoMe", None, scored=True)])
    monkeypatch.setattr(bench.Compression, "compressed", None)
    bench.main(["--base", str(folder.parent / "base"), "--finetunes",
                str(folder.parent / "finetuned"), "--rows", str(tmp_path), "--ratio", "3",
                "--parts", "widths", "--prompts", "4", "--solvers", "1", "--device", "cpu",
                "--known", str(tmp_path / "known.csv")])
    assert tables.read(tmp_path, rows.AccuracyRow) == given


def test_errors_by_layer_are_of_the_compared_methods(folder):
    found = tables.read(folder, paper_rows.ErrorRow)
    assert [row.method for row in found[::7]] == list(bench.COMPARED)
    assert {row.group for row in found} == {"high"} and {row.tokens for row in found} == {64}
    assert all(row.matrices == LAYERS and 0 < row.error_all < 1 for row in found)
    mean = {row.method: tables.average([one for one in found if one.method == row.method],
                                       "error_all") for row in found}
    assert mean["adamix"] < mean["AdaMix, published"] < mean["low rank, 16-bit"]


def test_the_plan_is_drawn_with_the_bytes_of_the_delta(folder):
    found = tables.read(folder, paper_rows.PlanRow)
    assert len(found) == 7 * LAYERS
    assert all(8 * row.in_features * row.out_features / 3
               > 8 * (row.v_bits_8 * row.in_features + row.u_bits_8 * row.out_features)
               for row in found)


def test_tables_and_pictures_come_from_the_rows_alone(folder, capsys):
    bench.main(["--rows", str(folder), "--table", "--plot"])
    said = capsys.readouterr().out
    for title in ("Table 6, base, invented at 1/3 (4 prompts)", "Table 8, base, invented: relative",
                  "Table 10, base, invented", "Table 9, base, invented, cpu at 1/3"):
        assert title in said
    assert (folder / "paper_components_invented.png").stat().st_size > 10_000
    assert (folder / "paper_plan_invented.png").stat().st_size > 10_000
    figure = plot.components_figure(tables.read(folder, paper_rows.ComponentRow))
    texts_are_apart(figure)


def test_data_without_a_pair_gives_errors_by_f_max(case, tmp_path, monkeypatch):
    delta, gram = case
    other = torch.eye(64)
    monkeypatch.setattr(bench, "matrices", lambda folder: iter(
        (f"layers.{i}.self_attn.q_proj", (i + 1) * delta, gram, other) for i in range(2)))
    bench.main(["--data", "made", "--rows", str(tmp_path), "--ratio", "3", "--device", "cpu",
                "--widths", "2", "none", "--solvers", "1", "--timed-layers", "1"])
    found = {row.method: row for row in tables.read(tmp_path, rows.AccuracyRow)}
    assert list(found) == ["adamix, f_max 2", "adamix, f_max none", "Delta-CoMe",
                           "AdaMix, published"]
    assert all(row.bytes <= 2 * 2 * delta.numel() / 3 for row in found.values())
    config = measures.adamix.Config(ratio=3, separate_widths=False)
    exact = measures.adamix.compress_matrix(delta, gram, config).dequantize()
    for name, inputs in (("error", gram), ("error_held_out", other)):
        assert getattr(found["adamix, f_max none"], name) == pytest.approx(
            measures.adamix.relative_error(delta, exact, inputs), rel=1e-3)
    assert {row.kind: row.matrices for row in tables.read(tmp_path, paper_rows.StageRow)} == {
        "q_proj": 1}
    assert "Table 6, made at 1/3: the widths" in tables.markdown(tmp_path)


# --- tables ------------------------------------------------------------------------------------


def error_row(method, group, kind, matrices, *values):
    return paper_rows.ErrorRow("m", "f", method, 16.0, 0, 0, group, kind, matrices, *values,
                               tokens=100)


def test_a_groups_figure_is_the_mean_of_its_matrices():
    found = [error_row("a", "low", "q_proj", 1, 0.1, 0.2, 0.001, 0.01),
             error_row("a", "low", "k_proj", 3, 0.5, 0.6, 0.005, 0.05),
             error_row("a", "high", "q_proj", 2, 0.3, 0.4, 0.003, 0.03)]
    lines = tables.group_tables(found).splitlines()
    assert lines[2] == "| method | Low: All | Out | Mid: All | Out | High: All | Out |"
    assert lines[4] == "| a | 0.4 | 0.5 |  |  | 0.3 | 0.4 |"  # (0.1 + 3 · 0.5) / 4, ..
    assert lines[-1] == "| a | 0.4 | 4 |  |  | 0.3 | 3 |"
    lines = tables.kind_tables(found).splitlines()
    assert lines[4:] == ["| q_proj | a | 0.1 | 0.2 |  |  | 0.3 | 0.4 |",
                         "| k_proj | a | 0.5 | 0.6 |  |  |  |  |",
                         "| average | a | 0.4 | 0.5 |  |  | 0.3 | 0.4 |"]


def test_the_table_of_widths_goes_by_method_and_f_max():
    def row(method, error):
        return rows.AccuracyRow("m", "f", method, 16.0, 0, 0, 1_000_000, error, error, 200, 100)

    lines = tables.widths_tables([
        row("adamix, f_max none", 0.01), row("adamix, f_max 2", 0.03), row("Delta-CoMe", 0.06),
        row("AdaMix, published, f_max 2", 0.05), row("AdaMix, published", 0.04)]).splitlines()
    assert [line.split(" | ")[:2] for line in lines[4:]] == [
        ["| Delta-CoMe", "–"], ["| AdaMix, published", "2"], ["| AdaMix, published", "4"],
        ["| adamix", "2"], ["| adamix", "none"]]
    assert lines[4] == "| Delta-CoMe | – | 50.0 |  |  | 0.0600 | 0.0600 | 1.00 |"


def test_the_table_of_seconds_sums_a_layer():
    found = [paper_rows.StageRow("m", "f", "adamix", 16.0, kind, "2x3", 4, 0.1, 0.2, 0.3, 0.4, 0.01,
                                 1.01, 1, "cpu") for kind in ("q_proj", "k_proj")]
    lines = tables.seconds_tables(found).splitlines()
    assert lines[4] == ("| q_proj | 2 × 3 | 4 | 0.100 | 0.200 | 0.300 | 0.400 | 0.010 | 1.010 |")
    assert lines[-1] == "| a layer |  |  | 0.200 | 0.400 | 0.600 | 0.800 | 0.020 | 2.020 |"


def test_the_table_of_accuracy_says_how_errors_compare():
    def row(method, ratio, seed, error, held_out):
        return types.SimpleNamespace(method=method, ratio=ratio, seed=seed, error=error,
                                     error_held_out=held_out)

    assert accuracy.comparisons([
        row("adamix", 32.0, 0, 0.04, 0.03), row("adamix", 32.0, 1, 0.05, 0.04),
        row("adamix", 16.0, 0, 0.012, 0.01), row("Delta-CoMe", 16.0, 0, 0.05, 0.025),
        row("AdaMix, published", 16.0, 0, 0.024, 0.016), row("base", None, None, None, None)]) == [
        "Error of adamix at 1/32 beside that of Delta-CoMe at 1/16: 0.0450 for 0.0500 on the "
        "calibration's inputs (10 % less), 0.0350 for 0.0250 on held-out ones (40 % more).",
        "Error of adamix at 1/16 beside that of AdaMix, published at 1/16: 0.0120 for 0.0240 on "
        "the calibration's inputs (50 % less), 0.0100 for 0.0160 on held-out ones (38 % less)."]
    assert accuracy.comparisons([row("adamix", 16.0, 0, 0.01, 0.01)]) == []


# --- the page ----------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
DATA = "smollm2-arith"  # the rows that the page shows


def test_the_page_has_the_tables_and_the_picture_of_the_rows():
    page = (ROOT / "benchmarks" / "QUALITY.md").read_text()
    read = {kind: [row for row in tables.read(tables.ROWS, kind) if row.model == DATA]
            for kind in tables.FILES}
    for text in (tables.widths_tables(read[rows.AccuracyRow]),
                 tables.seconds_tables(read[paper_rows.StageRow])):
        assert text and f"\n\n{text}\n\n" in page, "paste what bench_paper.py --table prints"
    assert len(read[paper_rows.ComponentRow]) == 576
    picture = f"paper_components_{DATA}.png"
    assert f"](results/{picture})" in page and (tables.ROWS / picture).is_file()
    assert all(row.commit and row.command and row.date for some in read.values() for row in some)


def test_what_the_page_says_of_components_is_in_the_rows():
    page = " ".join((ROOT / "benchmarks" / "QUALITY.md").read_text().split())
    found = [row for row in tables.read(tables.ROWS, paper_rows.ComponentRow) if row.model == DATA]
    values = {name: [getattr(row, name) for row in found]
              for name in ("singular_value", *(f"bits_{bits}" for bits in range(2, 9)))}
    spread = {name: max(some) / min(some) for name, some in values.items()}
    apart = sorted(spread[f"bits_{bits}"] for bits in range(2, 9))
    means = [sum(values[f"bits_{bits}"]) for bits in range(2, 9)]
    falls = sorted(before / after for before, after in itertools.pairwise(means))
    for said in (f"the largest is {apart[0]:.0f} to {apart[-1]:.0f} times the least",
                 f"singular values differ by {round(spread['singular_value'], -3):,.0f}",
                 f"falls {falls[0]:.1f} to {falls[-1]:.1f} times with each bit"):
        assert said in page, said
