"""The serving benchmarks as they run on a GPU, on a tiny model; times are not looked at."""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import one_thread as one_thread

import adamix
from adamix.serving.bank import DeltaBank

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
rows, serving_models, bench, swaps = map(
    importlib.import_module, ("rows", "serving_models", "bench_serving", "bench_swaps"))


def options(**changes):
    usual = {"model": "tiny", "layers": None, "finetunes": [1, 3], "prompt": 12, "dtype": "float32",
             "device": "cpu", "max_rank": None, "compile": False, "minutes": float("inf"),
             "csv": None}
    return argparse.Namespace(**(usual | changes))


def test_every_way_to_serve_is_measured_and_rows_survive_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda call, count, device: one_call(call))
    monkeypatch.setattr(serving_models, "measure", lambda call, count, device: one_call(call))
    run = bench.Bench(options(csv=tmp_path / "rows.csv"))
    for way in (run.adamix, run.base_alone, run.separate):
        way()
    read = rows.read_rows([tmp_path / "rows.csv"], rows.ServingRow)
    assert [(row.impl, row.finetunes) for row in read] == [
        ("adamix", 1), ("adamix", 3), ("base", 1), ("base", 3),
        ("separate models", 1), ("separate models", 3)]
    for row in read:
        assert row.decode_ms == 2.0 and row.tokens_per_s == 500 * row.finetunes and not row.note
        assert (row.prompt, row.layers, row.path) == (12, 2, "eager")
    assert all(row.error < 1e-5 for row in read[:2])
    one, three = (row.weights_gb for row in read[4:])
    assert three == pytest.approx(3 * one, rel=1e-3) and read[2].weights_gb == read[3].weights_gb


def one_call(call):
    call()
    return serving_models.Times(2.0, 1.0, 3.0, 5)


def test_files_of_other_columns_are_refused(tmp_path):
    run = bench.Bench(options())
    rows.append_row(tmp_path / "rows.csv", run.row)
    with pytest.raises(ValueError, match="other columns"):
        rows.read_rows([tmp_path / "rows.csv"])
    assert rows.read_rows([tmp_path / "rows.csv"], rows.ServingRow)[0].model == "tiny"
    assert {field.name for field in dataclasses.fields(rows.ServingRow)} > {"decode_ms", "peak_gb"}


def test_what_fails_is_a_row_that_says_why(tmp_path):
    run = bench.Bench(options(csv=tmp_path / "rows.csv"))

    def fail():
        raise torch.OutOfMemoryError("much")

    assert not run.attempt("adamix", 8, fail)
    [row] = rows.read_rows([tmp_path / "rows.csv"], rows.ServingRow)
    assert row.note == "out of memory" and row.decode_ms is None and "skipped" in bench.line(row)
    run.end = 0
    assert not run.attempt("adamix", 8, fail)


def test_a_step_goes_on_where_the_prompt_ended():
    model = serving_models.random_model("tiny", None, torch.float32, "cpu")
    prompts = torch.randint(1, 512, (2, 9))  # 0 would be padding to generate
    batch = serving_models.Sequences(model, prompts)
    batch.prefill()
    tokens = [batch.tokens.clone()]
    for _ in range(4):
        batch.step()
        tokens.append(batch.tokens.clone())
    want = model.generate(prompts, max_new_tokens=5, do_sample=False, eos_token_id=None,
                          pad_token_id=0)
    assert torch.equal(torch.cat(tokens, dim=1), want[:, 9:])


def test_a_random_fine_tune_has_its_bits_and_changes_every_layer():
    model = serving_models.random_model("tiny", None, torch.float32, "cpu")
    delta = serving_models.random_finetune(model, 0)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    packed = sum(matrix.nbytes for matrix in delta.matrices.values())
    assert 0.9 * weights <= 8 * packed <= 1.02 * weights
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            change = delta.matrices[name].dequantize().norm() / parameter.norm()
            assert 0.03 < change < 0.4, name
        else:
            assert not torch.equal(delta.whole[name], parameter)


def some_rows():
    plain = rows.ServingRow("m", 4, "bfloat16", 1, "adamix", "CUDA graph", 512, device="D",
                            commit="c", peak_gb=3.0, prefill_ms=5.0, date="2026-01-01",
                            command="bench")
    return [dataclasses.replace(plain, impl=impl, finetunes=count, decode_ms=ms * count,
                                tokens_per_s=1e3 / ms)
            for impl, ms in (("adamix", 2.0), ("separate models", 9.0)) for count in (1, 4)]


def test_the_table_compares_with_adamix(tmp_path):
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot_serving")
    old = dataclasses.replace(some_rows()[0], decode_ms=99.0)
    out_of_memory = dataclasses.replace(some_rows()[0], impl="LoRA", decode_ms=None)
    lines = plot.markdown(plot.latest([old, out_of_memory, *some_rows()])).splitlines()
    assert lines[0] == "m, 4 layers, a batch of one row a fine-tune, prompts of 512 tokens:"
    assert lines[-4:] == ["| 1 | 2.00 | 500 | 9.00 (4.50×) | 5 | 3.0 | 3.0 |",
                          "| 4 | 8.00 | 500 | 36.00 (4.50×) | 5 | 3.0 | 3.0 |", "",
                          "D, commit c, 2026-01-01; `bench`"]
    for row in some_rows():
        rows.append_row(tmp_path / "rows.csv", row)
    figure = plot.figure_of(plot.latest(some_rows()))
    assert [panel.get_title() for panel in figure.axes] == list(plot.PANELS)
    assert plot.figure_of(some_rows()[:1]) is None and plot.markdown([]) == "no rows"


def test_empty_places_of_a_bank_are_no_memory_of_its_fine_tunes():
    plot = importlib.import_module("plot_serving")
    one, four = (dataclasses.replace(row, model_gb=16.0, weights_gb=24.0, peak_gb=25.0,
                                     command="bench_serving.py --finetunes 1 4 8 --minutes 2")
                 for row in some_rows()[:2])
    assert one.slots == 8 and plot.place_gb(one) == 1.0
    assert (plot.memory_gb(one), plot.memory_gb(four)) == (18.0, 21.0)
    assert dataclasses.replace(one, command="bench_serving.py --minutes 2").slots == 64
    separate = dataclasses.replace(one, impl="separate models")
    assert plot.place_gb(separate) == 0.0 and plot.memory_gb(separate) == 25.0
    lines = plot.markdown([one, four, dataclasses.replace(four, impl="base", decode_ms=4.0,
                                                          prefill_ms=4.0)]).splitlines()
    assert lines[0].endswith("; a fine-tune takes 1.000 GB, 1/16.0 of the model:")
    assert lines[-3] == "| 4 | 8.00 (+100.0 %) | 500 | 4.00 | 5 (+25 %) | 21.0 |"


ARGUMENTS = ["bench_swaps.py", "--model", "tiny", "--device", "cpu", "--resident", "8", "--rows",
             "6", "--swaps", "12"]


def test_swaps_find_no_wrong_token(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ARGUMENTS)
    with pytest.raises(SystemExit) as ended:
        swaps.main()
    assert not ended.value.code and ", 0 of them wrong" in capsys.readouterr().out


def test_swaps_see_a_row_with_anothers_weights(monkeypatch, capsys):
    """Every tenth route is turned round."""
    own, routes = DeltaBank.route, []

    def faulty(self, names):
        routes.append(names)
        if len(routes) % 10 == 9:
            names = names[::-1]
        return own(self, names)

    monkeypatch.setattr(adamix.DeltaBank, "route", faulty)
    monkeypatch.setattr(sys, "argv", ARGUMENTS)
    with pytest.raises(SystemExit) as ended:
        swaps.main()
    assert ended.value.code and ", 0 of them wrong" not in capsys.readouterr().out
