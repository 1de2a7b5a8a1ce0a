"""compress from end to end: the same bytes whatever the threads, figures that an independent
computation confirms, and every tensor of the fine-tune accounted for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONTEXT,
    VARIANTS,
    checkpoint_tensors,
    compressed_pair,
    make_pair,
    tokenizer,
)
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM

from adamix import matrices
from adamix.calibration.blocks import Unsuited
from adamix.calibration.texts import token_hash, tokenize
from adamix.config import Config
from adamix.naming import read_indices
from adamix.pipeline import compress, compress_matrix, peak_bytes
from adamix.progress import Silent
from adamix.storage.file import delta_bytes, read_delta, read_manifest
from adamix.storage.log import read_log

pytestmark = pytest.mark.usefixtures("without_gpu")

# What compressed_pair() does.
OPTIONS = dict(bits_per_weight=3.0, bit_widths=(8, 4, 3, 2), calibration_sequences=8,
               calibration_length=32)
CONFIG = Config(**OPTIONS)
SAME = ("delta.safetensors", "delta_config.json", "calibration.safetensors", "spectra.safetensors")
EXAMPLES = Path(__file__).parents[1] / "examples"


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def restored(pair):
    """The base's weights with the delta added, in float64, by name."""
    delta = read_delta(pair.delta)
    weights = {name: t.double() for name, t in checkpoint_tensors(pair.base).items()}
    for name, matrix in delta.matrices.items():
        weights[name] += matrix.dequantize()
    weights |= {name: t.double() for name, t in delta.whole.items()}
    for name, rows in delta.extra_rows.items():
        weights[name] = torch.cat([weights[name], rows.double()])
    return weights


# --- determinism -------------------------------------------------------------------------------


def assert_same_files(folder, expected):
    for name in SAME:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_byte(tmp_path, threads):
    pair = compressed_pair()
    compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=threads)
    assert_same_files(tmp_path / "d", pair.delta)


def test_another_process_writes_the_same_bytes(tmp_path):
    pair = compressed_pair()
    code = ("import sys, adamix; base, finetuned, out = sys.argv[1:]; "
            f"adamix.compress(base, finetuned, out, adamix.Config(**{OPTIONS!r}), threads=2)")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code, pair.base, pair.finetuned, tmp_path / "d"],
                   check=True, env=environment, capture_output=True)
    assert_same_files(tmp_path / "d", pair.delta)


def test_another_seed_calibrates_with_other_text(tmp_path):
    pair = compressed_pair()
    compress(pair.base, pair.finetuned, tmp_path / "d", Config(**OPTIONS, seed=1), threads=1)
    found, other = read_manifest(pair.delta).calibration, read_manifest(tmp_path / "d").calibration
    assert found["sha256"] != other["sha256"]


@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_a_model_whose_blocks_do_not_run_alone_gives_the_same_bytes(tmp_path, monkeypatch, variant):
    def unsuited(*arguments):
        raise Unsuited("its blocks share weights")

    class Titles(Silent):
        def stage(self, title, total):
            titles.append(title)

    pair, titles = compressed_pair(variant), []
    monkeypatch.setattr(matrices, "BlockStream", unsuited)
    compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=2, progress=Titles())
    assert_same_files(tmp_path / "d", pair.delta)
    assert any("whole model in memory (its blocks share weights)" in title for title in titles)


# --- numbers -----------------------------------------------------------------------------------


def exact_inputs(pair, tokens):
    """{module: X [tokens, in]} of the fine-tune in float64."""
    model, seen = load(pair.finetuned, torch.float64), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output, name=name: seen.update(
                {f"{name}.weight": inputs[0].flatten(0, 1)}))
    with torch.inference_mode():
        model(input_ids=tokens)
    return seen


@pytest.mark.parametrize("variant", ["plain", "tied", "grown"])
def test_the_logs_errors_are_those_of_the_outputs(variant):
    pair = compressed_pair(variant)
    tokens = load_file(pair.delta / "calibration.safetensors")["input_ids"].long()
    old, new = checkpoint_tensors(pair.base), checkpoint_tensors(pair.finetuned)
    inputs, embedding = exact_inputs(pair, tokens), "model.embed_tokens.weight"
    rows = {row.name: row for row in read_log(pair.delta)}
    counts = torch.bincount(tokens.flatten(), minlength=len(new[embedding])).double()
    for name, packed in read_delta(pair.delta).matrices.items():
        delta = new[name].double()[: len(old[name])] - old[name].double()
        lost = delta - packed.dequantize().double()
        if name == embedding:
            root = (counts + 0.01 * counts.mean())[: len(delta), None].sqrt()
            delta, lost = root * delta, root * lost
        X = inputs.get("lm_head.weight" if name == embedding and variant == "tied" else name)
        if X is not None:
            delta, lost = delta @ X.T, lost @ X.T
        error = (lost.square().sum() / delta.square().sum()).item()
        assert rows[name].relative_error == pytest.approx(error, rel=1e-3), name
        assert 0 < error < 0.05


def test_compress_matrix_is_what_the_pipeline_does_to_one_matrix(tmp_path, monkeypatch):
    pair, grams, calibrated = compressed_pair(), {}, matrices.MatrixRun._grams

    def spy(*arguments):
        for modules, gram, origin in calibrated(*arguments):
            grams.update(dict.fromkeys(modules, gram.clone()))
            yield modules, gram, origin

    monkeypatch.setattr(matrices.MatrixRun, "_grams", spy)
    compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=1)
    packed = read_delta(tmp_path / "d").matrices
    old, new = checkpoint_tensors(pair.base), checkpoint_tensors(pair.finetuned)
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj",
                   "model.layers.1.mlp.down_proj", "lm_head"):
        name = f"{module}.weight"
        alone = compress_matrix(new[name].float() - old[name].float(), grams[module], CONFIG)
        assert alone.v_counts == packed[name].v_counts and alone.u_counts == packed[name].u_counts
        assert alone.shape == packed[name].shape
        assert torch.equal(alone.words, packed[name].words), name
        assert torch.equal(alone.scales, packed[name].scales), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_restored_weights_are_near_the_fine_tunes(variant):
    pair = compressed_pair(variant)
    old, new = checkpoint_tensors(pair.base), checkpoint_tensors(pair.finetuned)
    weights, packed = restored(pair), read_delta(pair.delta).matrices
    for name, weight in weights.items():
        if name in packed:
            delta = new[name].double()[: len(old[name])] - old[name].double()
            lost = new[name].double() - weight
            assert lost.norm() < 0.3 * delta.norm() and lost.norm() > 0, name
        elif name not in read_manifest(pair.delta).tied:
            assert torch.equal(weight, new[name].double()), name


def test_the_restored_model_speaks_like_the_fine_tune():
    pair, ids = compressed_pair(), torch.arange(4, 68).view(4, 16)
    model = load(pair.base)
    model.load_state_dict(restored(pair))
    with torch.inference_mode():
        got, wanted, before = (m(input_ids=ids).logits for m in
                               (model, load(pair.finetuned), load(pair.base)))
    assert (got - wanted).norm() < 0.2 * (before - wanted).norm()


# --- what became of each tensor ----------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_the_fine_tune_is_in_one_place(variant):
    pair = compressed_pair(variant)
    manifest = read_manifest(pair.delta)
    indices = {kind: last for kind, (_, _, last) in manifest.compressed.items()}
    places = [name for part in (indices, manifest.whole, manifest.equal)
              for kind, text in part.items() for name in read_indices(kind, text)]
    assert sorted(places + manifest.tied) == sorted(checkpoint_tensors(pair.finetuned))
    assert manifest.tied == (["lm_head.weight"] if variant == "tied" else [])
    grown = ["lm_head.weight", "model.embed_tokens.weight"] if variant == "grown" else []
    assert manifest.extra_rows == grown and manifest.absent == []
    assert (manifest.base, manifest.dtype) == (str(pair.base), "bfloat16")


def test_rows_beyond_a_base_whose_own_rows_are_unchanged_are_kept(tmp_path):
    base, finetuned = make_pair(tmp_path, grown_rows=5)
    old, new = checkpoint_tensors(base), checkpoint_tensors(finetuned)
    grown = ("lm_head.weight", "model.embed_tokens.weight")
    for name in grown:
        new[name] = torch.cat([old[name], new[name][-5:]])
    save_file(new, finetuned / "model.safetensors", metadata={"format": "pt"})
    config = Config(ratio=8, calibration_sequences=4, calibration_length=16)
    summary = compress(base, finetuned, tmp_path / "d", config, threads=1)
    delta = read_delta(tmp_path / "d")
    assert delta.extra_rows.keys() == set(grown) == delta.manifest.equal.keys()
    assert all(torch.equal(delta.extra_rows[name], new[name][-5:]) for name in grown)
    whole = sum(2 * t.numel() for name, t in new.items() if name not in grown) + 2 * 2 * 5 * 64
    assert summary.bytes_16bit == whole and summary.bytes <= whole / 8


def test_a_fine_tune_that_is_the_base_gives_a_delta_of_nothing(tmp_path):
    base = compressed_pair().base
    compress(base, base, tmp_path / "d", CONFIG, threads=1)
    delta = read_delta(tmp_path / "d")
    assert not delta.matrices and not delta.whole and not delta.extra_rows


def test_a_matrix_of_zeros_compresses_to_no_component():
    packed = compress_matrix(torch.zeros(64, 48), torch.eye(48), Config(bits_per_weight=2))
    assert packed.rank == 0 and torch.equal(packed.dequantize(), torch.zeros(64, 48))


# --- options -----------------------------------------------------------------------------------


def test_calibration_from_a_list_of_strings(tmp_path):
    pair = compressed_pair()
    texts = [f"document {i} says {i * i}" for i in range(30)]
    compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, calibration=texts, threads=1)
    expected = tokenize(texts, tokenizer(), sequences=8, length=32, seed=0)
    used = load_file(tmp_path / "d" / "calibration.safetensors")["input_ids"]
    assert torch.equal(used.long(), expected)
    assert read_manifest(tmp_path / "d").calibration == {
        "source": "strings", "sequences": 8, "length": 32, "sha256": token_hash(expected)}


def test_sequences_are_no_longer_than_the_models_context(tmp_path):
    pair = compressed_pair()
    config = Config(**{**OPTIONS, "calibration_length": 4 * CONTEXT, "calibration_sequences": 2})
    compress(pair.base, pair.finetuned, tmp_path / "d", config, threads=1)
    used = load_file(tmp_path / "d" / "calibration.safetensors")["input_ids"]
    assert used.shape == (2, CONTEXT) and (used[:, 0] == 1).all()


def test_the_presets_run_and_the_papers_uses_few_widths(tmp_path):
    pair, errors = compressed_pair(), {}
    for preset in ("adamix", "paper"):
        config = Config.preset(preset, ratio=8, calibration_sequences=8, calibration_length=32)
        summary = compress(pair.base, pair.finetuned, tmp_path / preset, config, threads=1)
        manifest = read_manifest(tmp_path / preset)
        assert manifest.config == json.loads(json.dumps(config.to_dict()))
        errors[preset] = summary.relative_error
        if preset == "paper":  # at most four, 0 bits counted
            matrices = read_delta(tmp_path / preset).matrices.values()
            assert all(len(packed.widths) <= 3 for packed in matrices)
    assert errors["adamix"] < 0.9 * errors["paper"]


def test_the_summary_says_what_is_on_disk(tmp_path):
    pair = compressed_pair()
    summary = compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=1)
    assert summary.out == tmp_path / "d" and summary.bytes == delta_bytes(tmp_path / "d")
    assert [row.name for row in summary.rows] == [row.name for row in read_log(tmp_path / "d")]
    errors = [row.relative_error for row in summary.rows]
    assert summary.relative_error == pytest.approx(sum(errors) / len(errors), rel=1e-12)
    assert summary.peak_bytes > 10**7
    assert {"read", "calibration tokens", "calibration and compression"} <= summary.seconds.keys()


def test_an_interrupt_ends_at_the_next_matrix_and_leaves_the_work_so_far(tmp_path, monkeypatch):
    pair, begun, quantize = compressed_pair(), [], matrices.quantize_matrix

    def interrupted(*arguments, **named):
        begun.append(1)
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # so that the main thread has its turn
        return quantize(*arguments, **named)

    monkeypatch.setattr(matrices, "quantize_matrix", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=1)
    assert len(begun) <= 3  # those on the input in hand, of 16
    assert [path.name for path in tmp_path.iterdir()] == [".d.partial"]


@pytest.mark.skipif(not (EXAMPLES / "finetuned" / "model.safetensors").exists(),
                    reason="examples/ has no pair of models")
def test_the_example_pair_at_one_sixteenth(tmp_path):
    base, finetuned = EXAMPLES / "base", EXAMPLES / "finetuned"
    summary = compress(base, finetuned, tmp_path / "d", Config(ratio=16, calibration_sequences=32))
    old, new = checkpoint_tensors(base), checkpoint_tensors(finetuned)
    whole = sum(2 * t.numel() for name, t in new.items() if not torch.equal(t, old[name]))
    size = sum((tmp_path / "d" / name).stat().st_size for name in SAME[:2])
    assert 0.98 * whole / 16 <= size == summary.bytes <= whole / 16
    assert read_delta(tmp_path / "d").matrices.keys() == {row.name for row in summary.rows}
    assert summary.relative_error < 0.5


def test_a_layer_that_no_input_reaches_is_compressed_all_the_same(tmp_path):
    """A dead up projection, zero in both models: the down projection's inputs are all zero."""
    base, finetuned = make_pair(tmp_path)
    dead, after = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down"))
    for folder in (base, finetuned):
        weights = load_file(folder / "model.safetensors")
        weights[dead].zero_()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    compress(base, finetuned, tmp_path / "out", CONFIG)
    delta = read_delta(tmp_path / "out")
    assert dead not in delta.matrices
    change = checkpoint_tensors(finetuned)[after].float() - checkpoint_tensors(base)[after].float()
    lost = (change - delta.matrices[after].dequantize()).square().sum() / change.square().sum()
    assert lost < 0.1


def test_the_peak_is_this_processs_own_whatever_began_it():
    held = torch.ones(2**28)  # 1 GiB
    script = "import adamix.pipeline as p; print(p.peak_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert 2**26 < int(done.stdout) < 2**30 <= held.nbytes < peak_bytes()
