"""tune: trained scales bring the model nearer to the fine-tune, and nothing else changes."""

import dataclasses
import json
import shutil

import pytest
import torch
from scales_by_hooks import assert_hooks_compute_what_the_scales_do
from tiny_models import VARIANTS, compressed_pair
from tiny_models import one_thread as one_thread
from typer.testing import CliRunner

import adamix
from adamix import tuning
from adamix.__main__ import app
from adamix.errors import AdamixError, CalibrationError, DeviceError, FingerprintError, OutputError
from adamix.evaluation import Window, score_windows
from adamix.merging import restored_model
from adamix.progress import Silent
from adamix.source.models import load_model
from adamix.storage.file import read_delta

pytestmark = pytest.mark.usefixtures("without_gpu")

OPTIONS = {"steps": 30, "device": "cpu"}


@pytest.fixture(scope="module")
def pair():
    return compressed_pair()


@pytest.fixture(scope="module")
def tuned(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "delta"
    return adamix.tune(pair.base, pair.finetuned, pair.delta, out, **OPTIONS)


def divergence(pair, delta, windows):
    return score_windows(restored_model(pair.base, delta), windows, load_model(pair.finetuned))[1]


def test_the_model_comes_nearer_to_the_fine_tune_on_what_was_not_trained_on(pair, tuned):
    assert tuned.kept and tuned.kl_after < 0.995 * tuned.kl_before
    held_out = [Window(ids, 1) for ids in tuning._tokens_of(pair.delta)[::8]]
    assert divergence(pair, pair.delta, held_out) == pytest.approx(tuned.kl_before, rel=1e-6)
    # The written delta is the model that was trained, to the rounding of Û(s·eᶠ)V̂.
    assert divergence(pair, tuned.out, held_out) == pytest.approx(tuned.kl_after, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_compute_what_the_scales_do(variant, tmp_path):
    pair = compressed_pair(variant)
    trained = assert_hooks_compute_what_the_scales_do(pair.base, pair.delta, tmp_path / "out")
    assert trained == read_delta(pair.delta).matrices.keys()


def test_scales_alone_change_and_no_byte_is_added(pair, tuned):
    before, after = read_delta(pair.delta), read_delta(tuned.out)
    assert after.manifest == before.manifest and after.matrices.keys() == before.matrices.keys()
    assert tuned.bytes == adamix.inspect(pair.delta).bytes == adamix.inspect(tuned.out).bytes
    for name, packed in before.matrices.items():
        now = after.matrices[name]
        assert torch.equal(now.words, packed.words) and now.v_counts == packed.v_counts
        factor = now.scales / packed.scales
        assert 0.5 < factor.min() < 1.0 < factor.max() < 2
    assert tuned.matrices == len(before.matrices)
    assert tuned.scales == sum(packed.rank for packed in before.matrices.values())
    for name, tensor in before.whole.items():
        assert torch.equal(after.whole[name], tensor)
    assert ({file.name for file in pair.delta.iterdir()}
            == {file.name for file in tuned.out.iterdir()})


def test_the_same_call_writes_the_same_bytes_and_another_seed_others(pair, tuned, tmp_path):
    adamix.tune(pair.base, pair.finetuned, pair.delta, tmp_path / "again", **OPTIONS)
    adamix.tune(pair.base, pair.finetuned, pair.delta, tmp_path / "other", seed=1, **OPTIONS)
    again, other, first = ((folder / "delta.safetensors").read_bytes()
                           for folder in (tmp_path / "again", tmp_path / "other", tuned.out))
    assert again == first != other


def test_a_step_by_hand(pair):
    """The gradient of a scale's logarithm is that of the scale times the scale."""
    delta, ids = read_delta(pair.delta), tuning._tokens_of(pair.delta)
    name = "model.layers.0.self_attn.q_proj.weight"
    model, reference = restored_model(pair.base, pair.delta), load_model(pair.finetuned)
    model.requires_grad_(False)
    with tuning._Trained(model, delta) as trained:
        training = tuning._Training(model, reference, ids, Silent())
        loss = training._loss(training.samples[:4])
        loss.backward()
        place = list(trained._matrices).index(name)
        gradient = trained.parameters[place].grad[0].item()

    def moved(step):
        other = restored_model(pair.base, pair.delta).double()
        packed = delta.matrices[name]
        V, U = (factor.double() for factor in packed.factors())
        weight = other.get_parameter(name)
        weight.data += step * packed.scales[0].double() * torch.outer(U[0], V[0])
        return tuning._Training(other, reference.double(), ids, Silent())._loss(
            training.samples[:4]).item()

    assert gradient == pytest.approx((moved(0.05) - moved(-0.05)) / 0.1, rel=0.02)
    windows = training._held_out
    assert loss.item() > 0 and score_windows(model, windows, reference)[1] == pytest.approx(
        divergence(pair, pair.delta, windows), rel=1e-6)  # the hooks are gone


def test_what_to_train_on_can_be_given(pair, tuned, tmp_path):
    ids = tuning._tokens_of(pair.delta)
    given = adamix.tune(pair.base, pair.finetuned, pair.delta, tmp_path / "ids", calibration=ids,
                        **OPTIONS)
    assert ((given.out / "delta.safetensors").read_bytes()
            == (tuned.out / "delta.safetensors").read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 200)
    done = adamix.tune(pair.base, pair.finetuned, pair.delta, tmp_path / "text", calibration=text,
                       **OPTIONS)
    assert done.tokens == 7 * 32 and done.kl_before != tuned.kl_before  # 8 x 32, one held out
    with pytest.raises(CalibrationError, match=r"ids of this model, 0\.\.127, got 500"):
        adamix.tune(pair.base, pair.finetuned, pair.delta, tmp_path / "out", **OPTIONS,
                    calibration=torch.full((4, 8), 500))


def test_few_tokens_move_scales_less_than_the_prior_alone_would(pair, tuned, tmp_path, monkeypatch):
    def moved(folder):
        before, after = read_delta(pair.delta).matrices, read_delta(folder).matrices
        return torch.cat([(after[name].scales / before[name].scales).log() for name in before])
    assert moved(tuned.out).square().mean().sqrt() < 0.2 * tuning.PRIOR
    monkeypatch.setattr(tuning, "PRIOR", 1e3)
    adamix.tune(pair.base, pair.finetuned, pair.delta, tmp_path / "free", **OPTIONS)
    assert moved(tmp_path / "free").norm() > 2 * moved(tuned.out).norm()


def test_models_in_16_bits_give_nearly_the_same_scales(pair, tuned, tmp_path):
    done = adamix.tune(pair.base, pair.finetuned, pair.delta, tmp_path / "out", dtype="bfloat16",
                       **OPTIONS)
    assert done.kl_before == pytest.approx(tuned.kl_before, rel=0.05)
    model = restored_model(pair.base, pair.delta, torch.bfloat16)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    moves = [torch.cat([(read_delta(folder).matrices[name].scales / packed.scales).log()
                        for name, packed in read_delta(pair.delta).matrices.items()])
             for folder in (tuned.out, tmp_path / "out")]
    assert not done.kept or torch.corrcoef(torch.stack(moves))[0, 1] > 0.5


def test_scales_stay_where_training_brings_nothing(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "PRIOR", 1e6)
    done = adamix.tune(pair.base, pair.finetuned, pair.delta, tmp_path / "out", steps=3,
                       learning_rate=0.9, device="cpu")
    assert not done.kept and done.kl_after >= done.kl_before
    assert ((tmp_path / "out/delta.safetensors").read_bytes()
            == (pair.delta / "delta.safetensors").read_bytes())


def test_faults_are_one_sentence_and_leave_nothing(pair, tmp_path):
    def refused(error, match, **changes):
        given = {"base": pair.base, "finetuned": pair.finetuned, "delta": pair.delta,
                 "out": tmp_path / "out"} | OPTIONS | changes
        before = set(tmp_path.rglob("*"))
        with pytest.raises(error, match=match):
            adamix.tune(**given)
        assert set(tmp_path.rglob("*")) == before

    refused(OutputError, "exists", out=pair.delta)
    refused(FingerprintError, "not the base", base=pair.finetuned)
    refused(DeviceError, "no device cuda:99", device="cuda:99")
    refused(ValueError, "steps >= 1.*got 0", steps=0)
    refused(ValueError, "bfloat16.*float16", dtype="float16")
    bare = tmp_path / "bare"
    shutil.copytree(pair.delta, bare)
    (bare / "calibration.safetensors").unlink()
    refused(CalibrationError, "no calibration.safetensors", delta=bare)
    from adamix.storage.log import write_tokens
    write_tokens(bare, torch.zeros(1, 32))
    refused(CalibrationError, r"two or more sequences.*\[1, 32\]", delta=bare)


def test_a_delta_with_nothing_to_train_is_refused(pair):
    delta = read_delta(pair.delta)
    with pytest.raises(AdamixError, match="no linear layer"):
        tuning._Trained(load_model(pair.base), dataclasses.replace(delta, matrices={}))


def test_the_command_says_what_it_brought(pair, tmp_path):
    arguments = ["tune", str(pair.base), str(pair.finetuned), str(pair.delta), "--steps", "10",
                 "--device", "cpu"]
    shown = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "one")])
    assert shown.exit_code == 0 and "nats a token before" in shown.output
    found = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "two"), "--json"])
    body = json.loads(found.stdout)
    assert body["kept"] and body["out"].endswith("two") and body["kl_after"] < body["kl_before"]
    refused = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "three"),
                                       "--dtype", "float16"])
    assert refused.exit_code == 2 and "float32 or bfloat16" in refused.output
