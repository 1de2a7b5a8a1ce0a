"""bench_compress.py and its parts on small shapes: made pairs, the plain version, rows."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import checkpoint_tensors
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM

from adamix import ops, relative_error
from adamix.compression.hessian import hessian, inverse_upper
from adamix.compression.matrix import quantize_matrix
from adamix.config import Config
from adamix.source.checkpoints import Checkpoint
from adamix.storage.pack import pack

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
bench, layers, made, plain, rows = map(importlib.import_module, (
    "bench_compress", "one_layer", "made_models", "straightforward", "rows"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return made.make_pair(tmp_path_factory.mktemp("made"), made.config_of("tiny", 1))


# --- made models -------------------------------------------------------------------------------


def test_a_made_pair_is_a_checkpoint_and_its_fine_tune(pair):
    for path in pair:
        _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    base, finetuned = map(checkpoint_tensors, pair)
    assert base.keys() == finetuned.keys() == made.shapes_of(made.config_of("tiny", 1)).keys()
    for name, weight in base.items():
        assert weight.dtype == torch.bfloat16 and not torch.equal(weight, finetuned[name])
        if weight.dim() > 1:
            weight = weight.float()
            assert weight.std() == pytest.approx(made.WEIGHT_STD, rel=0.02)
            change = finetuned[name].float() - weight
            assert change.norm() / weight.norm() == pytest.approx(made.DELTA_SHARE, rel=0.02)


def test_shards_are_filled_and_what_is_there_is_taken_if_it_is_the_same(tmp_path, monkeypatch):
    config = made.config_of("tiny", 1)
    monkeypatch.setattr(made, "SHARD_BYTES", 3e5)
    paths = made.make_pair(tmp_path, config)
    files = sorted(paths[0].glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert len(files) > 2 and sum(sizes) == made.model_size(config)
    assert max(sizes) <= 3e5 < min(a + b for a, b in zip(sizes, sizes[1:], strict=False))
    assert Checkpoint(paths[0]).headers.keys() == made.shapes_of(config).keys()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    made.make_pair(tmp_path, config)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    made.make_pair(tmp_path, made.config_of("tiny", 2))
    assert len(Checkpoint(paths[1]).names) > len(made.shapes_of(config))


def test_any_config_can_be_taken_and_tied_heads_are_left_out(pair, tmp_path):
    config = made.config_of(str(pair[0] / "config.json"))
    assert made.shapes_of(config) == made.shapes_of(made.config_of("tiny", 1))
    config.tie_word_embeddings = True
    assert "lm_head.weight" not in made.shapes_of(config)
    # Qwen2.5-7B, as its model card has it: 7.61 billion.
    assert made.model_size(made.config_of("qwen2.5-7b"), 1) == 7_615_616_512


def test_a_change_decays_as_the_docstring_says():
    old, new = made.draw_pair("x.weight", (640, 512), torch.float32, "cpu", 0)
    s = torch.linalg.svdvals(new - old)
    for i in (3, 15, 63):
        assert s[i] / s[0] == pytest.approx((1 + i / 4) ** -0.75, abs=0.05)
    assert 0.003 < (s[256:].square().sum() / s.square().sum()).item() < 0.03


# --- the plain version -------------------------------------------------------------------------


def matrix(out, n):
    old, new = made.draw_pair("x.weight", (out, n), torch.float32, "cpu", 0)
    return new - old, made.random_gram(n)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)], ids=str)
@pytest.mark.parametrize("preset, changes", [
    ("paper", {}), ("adamix", {}), ("adamix", {"correction": False, "passes": 1})])
def test_the_plain_version_is_the_method(shape, preset, changes):
    delta, gram = matrix(*shape)
    config = Config.preset(preset, bits_per_weight=1.5, **changes)
    clock = plain.Clock(delta.device)
    (found,) = plain.compress_group(gram, {"x": delta}, config, clock).values()
    ours = quantize_matrix(delta, hessian(gram, config.damping), config)
    error = relative_error(delta, found.U @ found.V, gram)
    assert error == pytest.approx(relative_error(delta, pack(ours.delta).dequantize(), gram),
                                  rel=0.03)
    pairs = zip(found.v_bits, found.u_bits, strict=True)
    assert sum(plain.component_bits(shape, *pair) for pair in pairs) <= config.budget_bits(shape)
    assert clock.seconds == clock.measured and clock.widths == clock.widths_of == 7
    assert list(clock.seconds) == [plain.HESSIAN, plain.SVD, plain.WIDTHS, plain.ILP, plain.REST]


def test_columns_of_several_widths_are_quantized_as_by_the_operator():
    torch.manual_seed(0)
    weight, x = torch.randn(50, 150), torch.randn(150, 400, dtype=torch.float64)
    hinv = inverse_upper(x @ x.T)
    bits = torch.arange(150, dtype=torch.int32) % 7 + 2
    scales = 3.0 / 2.0**bits
    codes = ops.gptq(weight, hinv, bits, scales, by_row=False)
    want = scales * (2.0 * codes - (2.0**bits - 1))
    got = plain.gptq_columns(weight, hinv, bits.tolist(), scales.tolist())
    assert ((got - want).abs() > 1e-5).float().mean() < 0.01  # sums in another order


def test_a_share_of_the_widths_is_scaled_to_all(monkeypatch):
    delta, gram = matrix(64, 96)
    clock = plain.Clock(delta.device)
    times = iter(range(100))
    monkeypatch.setattr(plain.Clock, "now", lambda self: float(next(times)))
    plain.compress_group(gram, {"x": delta}, Config(bits_per_weight=2.0), clock, seconds=2.5)
    assert (clock.widths, clock.widths_of) == (3, 7)  # after 1, 2 and 3 s
    assert clock.measured[plain.WIDTHS] == 3 and clock.seconds[plain.WIDTHS] == 7
    assert clock.seconds[plain.SVD] == clock.measured[plain.SVD] == 1


def test_a_layer_is_compressed_in_both_ways(pair):
    layer = layers.read_layer(*pair, "cpu")
    assert {key: len(deltas) for key, deltas in layer.groups.items()} == {
        "q": 3, "o": 1, "gate": 2, "down": 1}
    config = Config(ratio=16)
    ours = layers.adamix_layer(layer, config, 2)
    rival = layers.straightforward_layer(layer, config, None)
    assert rival.error == pytest.approx(ours.error, rel=0.03) and not rival.note
    assert rival.seconds == pytest.approx(sum(rival.stages.values())) and rival.measured is None
    part = layers.straightforward_layer(layer, config, 0.0)
    assert part.error is None and "7 of 49" in part.note and part.measured < part.seconds


# --- the program -------------------------------------------------------------------------------


def test_the_program_measures_a_pair_and_its_layer(tmp_path, monkeypatch, capsys):
    csv = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", [
        "bench_compress.py", "--model", "tiny", "--layers", "1", "--device", "cpu", "--sequences",
        "3", "--length", "16", "--rival", "--folder", str(tmp_path / "kept"), "--csv", str(csv)])
    bench.main()
    read = rows.read_rows([csv], rows.CompressionRow)
    whole = [row for row in read if row.stage == rows.WHOLE]
    assert [(row.scope, row.impl) for row in whole] == [
        ("model", "adamix"), ("layer", "adamix"), ("layer", "straightforward")]
    model = whole[0]
    stages = [row for row in read if row.scope == "model" and row is not model]
    assert {"imports", "read", "calibration and compression"} <= {row.stage for row in stages}
    assert sum(row.seconds for row in stages) == pytest.approx(model.seconds, rel=1e-3)
    assert 0.1 < model.host_gb < 8 and model.device_gb is None and "9 matrices" in model.note
    assert model.ratio == pytest.approx(16, rel=0.01) and model.sequences == 3
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "base", "finetuned", "tokens.safetensors"]
    said = capsys.readouterr().out
    assert "times as fast" in said and f"SHA-256 {model.sha256}" in said
    assert model.processes == 1 and len(model.sha256) == 64


def test_several_processes_are_measured_and_write_the_same_bytes(tmp_path, monkeypatch):
    csv = tmp_path / "rows.csv"
    for processes in ("1", "2"):
        monkeypatch.setattr(sys, "argv", [
            "bench_compress.py", "--model", "tiny", "--layers", "1", "--device", "cpu",
            "--sequences", "20", "--length", "16", "--threads", "2", "--processes", processes,
            "--folder", str(tmp_path / "kept"), "--csv", str(csv)])
        bench.main()
    read = rows.read_rows([csv], rows.CompressionRow)
    one, two = (row for row in read if row.stage == rows.WHOLE)
    assert (one.processes, two.processes, one.threads, two.threads) == (1, 2, 2, 1)
    assert one.sha256 == two.sha256 and one.bytes == two.bytes
    stages = [row for row in read if row.processes == 2 and row is not two]
    assert sum(row.seconds for row in stages) == pytest.approx(two.seconds, rel=1e-3)
    assert 0.1 < two.host_gb < 8


def test_without_a_folder_the_pair_is_made_where_there_is_room(tmp_path, monkeypatch):
    with bench.place(tmp_path, 1e30) as folder:
        assert folder == tmp_path
    for size, in_memory in ((1.0, bench.MEMORY.is_dir()), (1e30, False)):
        with bench.place(None, size) as folder:
            assert (bench.MEMORY in folder.parents) == in_memory
        assert not folder.exists()
