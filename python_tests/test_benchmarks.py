"""The benchmarks' own arithmetic: sizes, bytes, rows and tables. Timings are never tested."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from adamix import ops

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
banks, bench, gptq_bench, rows, tables, harness, signs = map(
    importlib.import_module,
    ("banks", "bench_delta_gemm", "bench_gptq", "rows", "tables", "harness", "rivals.signs"))
dense, unpacked, loop = map(
    importlib.import_module, ("rivals.dense", "rivals.unpacked", "rivals.gptq_loop"))

SHAPES = [(in_features, outs[0]) for in_features, outs in bench.SHAPES.values()]


def case(**changes):
    fields = {"in_features": 512, "outs": (768,), "models": 3, "tokens": 1, "device": "cpu"}
    return banks.Case(**(fields | changes))


@pytest.mark.parametrize("in_features, out", SHAPES)
def test_drawn_deltas_have_one_bit_a_weight_and_the_mean_rank(in_features, out):
    rng = np.random.default_rng(0)
    drawn = [banks.Slot(in_features, out, counts, counts, 0)
             for counts in (tuple(banks.draw_counts(rng, in_features, out)) for _ in range(20))]
    bits = np.array([32 * sum(slot.sizes) for slot in drawn]) / (in_features * out)
    widest = (8 * (in_features + out) + 32) / (in_features * out)  # one component
    assert 0.99 <= bits.mean() <= 1
    assert bits.max() <= 1 and bits.min() > 1 - widest
    ranks = [slot.rank for slot in drawn]
    assert len(set(ranks)) > 1
    assert abs(np.mean(ranks) / banks.mean_rank(in_features, out) - 1) < 0.02
    shares = np.sum([slot.v_counts for slot in drawn], axis=0) / sum(ranks)
    assert np.allclose(shares, [banks.WIDTH_SHARES.get(b, 0) for b in range(8, 0, -1)], atol=0.03)


def test_the_mean_rank_by_hand():
    # 100 x 100 weights at 1 bit; a component takes 3.19 * 200 + 32 = 670 bits.
    assert banks.MEAN_BITS == pytest.approx(3.19)
    assert banks.mean_rank(100, 100) == 14


def test_slots_are_aligned_and_do_not_overlap():
    bank = banks.make_bank(case(outs=(512, 64)), sets=3)
    spans = sorted((offset, offset + size) for slot in bank.every
                   for offset, size in zip(slot.offsets, slot.sizes, strict=True))
    assert all(begin % 64 == 0 for begin, _ in spans)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    assert spans[-1][1] <= len(bank.arena)
    assert bank.packed_bytes == pytest.approx(case(outs=(512, 64)).packed_bytes, rel=0.05)


@pytest.mark.parametrize("outs, one_by_one", [((768,), False), ((512, 64), False),
                                              ((512, 64), True)])
def test_adamix_is_checked_and_counted(outs, one_by_one):
    ready = bench.adamix_work(case(outs=outs, tokens=2), one_by_one).build(2)
    assert 0 < ready.error < 1e-2
    ((calls),) = ready.paths.values()
    assert len(calls) == 2
    for call in calls:
        call()


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = ops.delta_gemm_
    monkeypatch.setattr(ops, "delta_gemm_", lambda y, x, *rest, **keys: right(
        y, x * 1.02, *rest, **keys))
    with pytest.raises(harness.SkippedError, match="wrong: error 2"):
        bench.adamix_work(case()).build(1)


def test_bytes_and_operations_by_hand():
    three = case(in_features=512, outs=(256,), models=3, tokens=2)
    assert three.packed_bytes == 3 * 512 * 256 / 8
    assert three.activation_bytes == 6 * (512 + 2 * 256) * 2
    weights = dense.naive(three).build(1)
    assert weights.moved == 3 * 512 * 256 * 2 + 6 * (512 + 256) * 2
    assert weights.flops == 2 * 6 * 512 * 256
    # 512 * 256 / 8 bytes in columns of 2 * (512 + 256): 10.7, in rows of 16 bytes 8
    assert dense.low_rank_rank(three) == 8


@pytest.mark.parametrize("rival", ["naive", "low_rank", "base_gemm"])
def test_dense_rivals_run_on_every_path(rival):
    ready = getattr(dense, rival)(case(tokens=2)).build(2)
    assert len(ready.paths) == 2
    for calls in ready.paths.values():
        assert len(calls) == 2
        calls[0]()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_plain_unpacking_reads_codes_in_order(bits):
    in_a_word = 32 // bits
    codes = torch.randint(0, 2**bits, (3, 5, 2 * in_a_word))
    shifts = torch.arange(0, in_a_word * bits, bits)
    words = (codes.view(3, 5, 2, in_a_word) << shifts).sum(-1)
    words = (words - (words >> 31 << 32)).to(torch.int32)
    out = torch.empty(3, 5, 2 * in_a_word - 1, dtype=torch.bfloat16)
    unpacked.unpack_levels(words, shifts.to(torch.int32), bits, out)
    assert out.equal((2 * codes - 2**bits + 1)[..., :-1].to(torch.bfloat16))


def test_signs_of_the_one_bit_rival():
    random = torch.randn(2, 1024, 5).sign()
    words = signs.pack_signs(random)
    assert words.shape == (2, 32, 5) and words.dtype == torch.int32
    assert signs.signs_of(words).equal(random)
    only = torch.full((1, 512, 1), -1.0)
    only[0, 16 * 3 + 5] = 1.0  # bit 3 of word 5
    assert signs.pack_signs(only).flatten().tolist() == [8 if w == 5 else 0 for w in range(16)]
    x, alpha, y = torch.randn(2, 3, 1024), torch.tensor([0.5, 2.0]), torch.randn(2, 3, 5)
    want = y + torch.stack([0.5 * x[0] @ random[0], 2.0 * x[1] @ random[1]])
    assert torch.allclose(signs.sign_product(x, words, alpha, y), want, atol=1e-3)


@pytest.mark.parametrize("n", [100, 300])
def test_the_loop_rival_is_gptq(n):
    hinv = gptq_bench.inverse_factor(n, "cpu")
    bits, scales = gptq_bench.lanes(20, n, True, range(3, 4), "cpu")
    weight = torch.randn(20, n)
    got = loop.gptq_loop(weight, hinv, 3, scales)
    want = ops.gptq(weight, hinv, bits, scales, by_row=True)
    assert (got != want).float().mean() < 0.01  # sums in another order move a code now and then


def test_gptq_widths_come_in_equal_shares():
    bits, scales = gptq_bench.lanes(7 * 10, 5, True, range(2, 9), "cpu")
    assert bits.bincount().tolist() == [0, 0] + [10] * 7 and scales.shape == (70,)


def test_rotation_exceeds_the_cache_where_memory_allows():
    assert harness.rotation(8.5e6, 100e9, 60e6) == 48
    assert harness.rotation(8.6e9, 130e9, 60e6) == 4
    assert harness.rotation(8.6e9, 30e9, 60e6) == 2
    assert harness.rotation(1.0, 130e9, 60e6) == harness.MAX_SETS
    with pytest.raises(harness.SkippedError, match="out of memory"):
        harness.rotation(8.6e9, 10e9, 60e6)


def test_the_roof_is_the_longer_of_moving_and_computing():
    assert rows.roof_us(4e9, 0, 4000, 800) == pytest.approx(1000)
    assert rows.roof_us(4e6, 800e9, 4000, 800) == pytest.approx(1000)


def sample(impl, us, **changes):
    fields = {"op": "delta_gemm", "shape": "3584x18944", "models": 32, "tokens": 1,
              "dtype": "bfloat16", "bits": "1.00"}
    return rows.Row(**(fields | changes), impl=impl, us=us, us_min=us, us_max=us, bytes=2.7e8,
                    flops=1e9, gb_per_s=3000.0, tflop_per_s=10.0, roof_share=0.75,
                    copy_gb_per_s=4000.0, roof_tflop_per_s=790.0, device="H200", commit="abc",
                    command="bench.py", date="2026-01-01")


def test_rows_come_back_from_the_file(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    written = [sample("adamix", 90.5), rows.Row("gptq", "a, b", None, None, "float32", "2..8", "x",
                                                note='a "fault"')]
    for row in written:
        rows.append_row(path, row)
    assert rows.read_rows([path]) == written
    assert path.read_text().count("op,shape") == 1
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.append_row(path, written[0])


def test_the_last_measurement_of_a_key_counts():
    skipped = rows.Row("delta_gemm", "3584x18944", 32, 1, "bfloat16", "1.00", "adamix", note="no")
    (row,) = rows.latest([skipped, sample("adamix", 1.0), sample("adamix", 2.0), skipped]).values()
    assert row.us == 2.0


def test_a_command_names_files_and_no_folders():
    command = rows.command_of(["/a/bench.py", "--csv", "/b/c/rows.csv", "--csv=../x.csv", "a b"])
    assert command == "bench.py --csv rows.csv --csv=x.csv 'a b'"


def test_the_best_ceilings_of_all_runs_are_told():
    def copy(name, rate):
        return rows.Row(rows.CEILING, "2 GiB", None, None, "int32", "", name, us=1.0,
                        gb_per_s=rate)

    told = tables.ceilings([copy("copy", 2700.0), copy("copy by a kernel", 4243.0),
                            copy("copy", 4251.0), copy("copy by a kernel", 4100.0)])
    assert told == "The device's own ceilings (the roof): copy 4.25 TB/s read and written."


def test_tables_are_drawn_from_rows():
    text = tables.markdown([
        sample("adamix", 90.0), sample("full weights", 963.0),
        sample("adamix", 300.0, tokens=512, models=1), sample("base GEMM", 600.0, tokens=512,
                                                              models=1),
        *(sample(impl, us, op="gptq", shape="7168x3584", models=None, tokens=None, bits="2..8",
                 path="by row") for impl, us in (("adamix", 4e3), ("torch loop", 5e5))),
        sample("adamix", 40.0, op="pack", models=None, tokens=None, bits="3")])
    assert "| 3584 × 18944 | 32 | **90.0** | 75 % | 963 (10.7×) |" in text
    assert "| 3584 × 18944 | 1 | 512 | 300 | 600 | 0.50 | 10 |" in text
    assert "| 7168 × 3584 | by row | 2..8 | 4 | 10.0 | 75 % | 500 (125×) |" in text
    assert "| `pack` | 3584 × 18944 | 3000 (75 %) |" in text
    assert text.endswith("H200, commit abc, 2026-01-01; `bench.py`")


def test_pictures_are_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("plot")
    some = [sample(impl, us * models, models=models) for impl, us in (("adamix", 3.0),
            ("full weights", 30.0)) for models in (1, 2, 4)]
    some += [sample(impl, 300.0, tokens=512) for impl in ("adamix", "base GEMM")]
    figure = plot.tokens_figure(some)
    assert [panel.get_title() for panel in figure.axes] == ["3584 × 18944 (in × out)"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[1.0, 1.0], [1.0]]
    assert plot.tokens_figure([row for row in some if row.tokens == 1]) is None
    assert [path.name for path in plot.draw(some, tmp_path)] == list(plot.FIGURES)
    assert plot.draw([], tmp_path) == []


def test_the_table_suite_covers_what_the_readme_claims():
    plans = list(bench.table_suite())
    assert ("3584x18944", 32, 1, ("adamix", *bench.RIVALS)) in plans
    assert all(set(impls) <= set(bench.IMPLEMENTATIONS) for *_, impls in plans)
    assert set(tables.HEADINGS) == set(bench.IMPLEMENTATIONS) - {"adamix"}
