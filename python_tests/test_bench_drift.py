"""bench_drift.py's arithmetic on a tiny random pair; no timings are judged."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import LAYERS, make_pair
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("without_gpu")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
bench, drift, models, answers, rows = map(importlib.import_module, (
    "bench_drift", "drift_models", "accuracy_models", "answers", "rows"))
RATIO = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def compression(folders, tmp_path_factory):
    load = AutoModelForCausalLM.from_pretrained
    config = models.adamix.Config(calibration_sequences=12, calibration_length=32)
    made = models.Compression(*folders, *(load(path, dtype=torch.float32) for path in folders),
                              config, tmp_path_factory.mktemp("deltas"), [torch.arange(1, 40)])
    made.compressed("adamix", RATIO)
    return made


def weights(compression, variant):
    """Of the layers that a variant makes."""
    drifting = drift.Drifting(compression, RATIO)
    return weights_of(drifting.result(drifting.packed(variant), 0.0))


def weights_of(result):
    return {name: layer.weight for name, layer in answers.block_linears(result.model).items()}


def test_as_now_has_the_bits_of_compress(compression):
    drifting = drift.Drifting(compression, RATIO)
    found = drifting.result(drifting.packed(bench.VARIANTS[bench.AS_NOW]), 0.0)
    theirs = compression.by_preset("adamix", RATIO)
    same = weights_of(theirs)
    assert all(torch.equal(one, same[name]) for name, one in weights_of(found).items())
    assert (found.bytes, found.error, found.error_held_out) == (
        theirs.bytes, theirs.error, theirs.error_held_out)


def test_a_share_of_0_changes_no_target(compression):
    plain, none = (weights(compression, variant) for variant in (
        drift.Variant(), drift.Variant(share=0.0, residual=1.0)))
    assert all(torch.equal(one, none[name]) for name, one in plain.items())


def test_without_drift_nothing_is_corrected(compression, monkeypatch):
    sums_of = drift.Sums.of
    monkeypatch.setattr(drift.Sums, "of", lambda stage, theirs, ours: sums_of(
        stage, theirs, theirs))  # X̂ = X
    found = weights(compression, drift.Variant(share=1.0, residual=1.0))
    theirs = weights(compression, bench.VARIANTS[bench.AS_NOW])
    before = answers.block_linears(compression.base_model)
    for name, one in found.items():  # sums in another order: a code may differ
        assert (one - theirs[name]).norm() < 0.02 * (theirs[name] - before[name].weight).norm()


def least_squares(seed=0, tokens=200, outputs=6, inputs=9, damping=0.03):
    """(W, ΔW, X, X̂, h − ĥ, their sums, λ), tokens as rows."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    W, delta, X, residual = (normal(outputs, inputs), normal(outputs, inputs),
                          normal(tokens, inputs), normal(tokens, outputs))
    ours = X + 0.3 * normal(tokens, inputs)
    gram = ours.T @ ours
    sums = drift.Sums(gram, (X - ours).T @ ours, residual.T @ ours)
    return W, delta, X, ours, residual, sums, damping * gram.diagonal().mean()


@pytest.mark.parametrize("share_of_residual", [0.0, 1.0])
def test_the_target_solves_the_damped_least_squares(share_of_residual):
    W, delta, X, ours, residual, sums, ridge = least_squares()
    variant = drift.Variant(share=1.0, damping=0.03, residual=share_of_residual)
    # (W_base + Δ) X̂ = W X + h − ĥ, and √λ (Δ − ΔW) = 0
    wanted = X @ W.T + share_of_residual * residual - ours @ (W - delta).T
    eye = ridge.sqrt() * torch.eye(W.shape[1], dtype=torch.float64)
    exact = torch.linalg.lstsq(torch.cat([ours, eye]), torch.cat([wanted, eye @ delta.T])).solution
    torch.testing.assert_close(drift.target(delta, W, sums, variant), exact.T, rtol=0, atol=1e-10)
    half = drift.target(delta, W, sums, replace(variant, share=0.5))
    torch.testing.assert_close(half, (delta + exact.T) / 2, rtol=0, atol=1e-10)


def test_scales_make_up_for_what_is_lacking(compression):
    packed = next(one for one in compression.compressed("adamix", RATIO).delta.matrices.values()
                  if one.shape == (64, 64))
    V, U = (one.double() for one in packed.factors())
    U = U * packed.scales.double()[:, None]
    random = torch.Generator().manual_seed(1)
    X = torch.randn(300, 64, generator=random, dtype=torch.float64)
    change = 0.1 * torch.randn(packed.rank, generator=random, dtype=torch.float64)
    lacking = (U.T * change) @ V @ X.T @ X
    variant = drift.Variant(share=1.0, scales=True, damping=1e-12)
    found = drift.with_scales(packed, lacking, X.T @ X, variant)
    assert found.nbytes == packed.nbytes and torch.equal(found.words, packed.words)
    torch.testing.assert_close(found.scales.double(), packed.scales * (1 + change), rtol=1e-4,
                               atol=0)


@torch.no_grad()
def test_block_by_block_has_the_activations_of_whole_forwards(compression):
    model, tokens = compression.reference, compression.tokens
    seen = {}
    names = [stage.linears[0] for stage in drift.STAGES]
    residuals = ["input_layernorm", "post_attention_layernorm"]
    hooks = [module.register_forward_pre_hook(
        lambda module, given, name=name: seen.__setitem__(name, given[0].flatten(0, -2)))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in names + residuals]
    model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    entered = drift.Entered.first(model, tokens)
    assert len(entered.states) == 2  # chunks, of which the last is smaller
    for number, block in enumerate(drift.blocks_of(model)):
        found = entered.inputs(block, names + residuals, names[-1])
        paths = {name.rpartition(".")[2]: name for name in seen if f"layers.{number}." in name}
        for kind in names + residuals:
            whole = torch.cat([one[kind] for one in found])
            torch.testing.assert_close(whole, seen[paths[kind]], rtol=1e-4, atol=1e-5)
        entered = entered.through(block)
    assert number == LAYERS - 1


def test_rows_of_the_variants_that_were_asked_for(folders, tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "cd", "answer": "e"}\n')
    text = tmp_path / "text.txt"
    text.write_text("What stands here is read by two models.")
    variants = [bench.AS_NOW, "drift, residual, writers"]
    arguments = ["--base", folders[0], "--finetunes", folders[1], "--asked", asked, "--text", text,
                 "--ratios", RATIO, "--sequences", 8, "--length", 16, "--no-answers",
                 "--csv", tmp_path / "rows.csv", "--variants"]
    bench.main([*map(str, arguments), *variants])
    bench.main([*map(str, arguments), variants[1], "--tuned"])
    found = rows.read_rows([tmp_path / "rows.csv"], rows.AccuracyRow)
    assert [row.method for row in found] == [*variants, f"{variants[1]}, tuned"]
    assert all(row.bytes <= found[0].bytes and 0 < row.kl_prompts for row in found)
    assert found[0].kl_text != found[1].kl_text
