"""merge and restore: base + Δ̂ to the last bit, loadable by transformers, only on its own base."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, checkpoint_tensors, compressed_pair
from tiny_models import one_thread as one_thread
from tolerance import assert_within_rounding
from transformers import AutoModelForCausalLM, AutoTokenizer

from adamix import merging
from adamix.artifacts import ModelDelta
from adamix.errors import DeltaFileError, FingerprintError, OutputError
from adamix.merging import merge, restore, restored_model
from adamix.naming import read_indices
from adamix.progress import Silent
from adamix.source.checkpoints import Checkpoint
from adamix.storage.file import read_delta

IDS = torch.arange(4, 60).view(2, 28)


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_weight_is_base_plus_delta_and_the_rest_is_the_fine_tunes(variant, tmp_path):
    pair = compressed_pair(variant)
    merge(pair.base, pair.delta, tmp_path / "out", dtype="float32")
    merged, delta = checkpoint_tensors(tmp_path / "out"), read_delta(pair.delta)
    base, finetuned = checkpoint_tensors(pair.base), checkpoint_tensors(pair.finetuned)
    assert merged.keys() == finetuned.keys() - set(delta.manifest.tied)
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32 and tensor.shape == finetuned[name].shape
        if name not in delta.matrices:
            assert torch.equal(tensor, finetuned[name].float()), name
            continue
        change, old = delta.matrices[name].dequantize().double(), base[name].double()
        rows = len(old)
        assert_within_rounding(tensor[:rows], old + change, old.abs() + change.abs(), 1)
        assert torch.equal(tensor[rows:], finetuned[name][rows:].float()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_checkpoint_loads_and_computes_what_the_restored_model_does(variant, tmp_path):
    pair = compressed_pair(variant)
    merge(pair.base, pair.delta, tmp_path / "out", dtype=torch.float32)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    restored = restored_model(pair.base, pair.delta)
    assert torch.equal(logits_of(loaded), logits_of(restored))
    finetuned = AutoModelForCausalLM.from_pretrained(pair.finetuned, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    shared = base.config.vocab_size
    near = (logits_of(restored) - logits_of(finetuned))[..., :shared].abs().mean()
    far = (logits_of(base) - logits_of(finetuned)[..., :shared]).abs().mean()
    assert near < 0.25 * far
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == [1, 14, 15]


def test_the_head_that_a_config_ties_is_in_no_merged_file(tmp_path):
    pair = compressed_pair("tied")
    assert "lm_head.weight" in checkpoint_tensors(pair.finetuned)
    merge(pair.base, pair.delta, tmp_path / "out")
    assert "lm_head.weight" not in checkpoint_tensors(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_rounding_error_is_that_of_a_float64_computation(dtype, tmp_path):
    pair = compressed_pair()
    summary = merge(pair.base, pair.delta, tmp_path / "out", dtype=dtype)
    merged, base = checkpoint_tensors(tmp_path / "out"), checkpoint_tensors(pair.base)
    lost, whole = {}, {}
    for name, packed in read_delta(pair.delta).matrices.items():
        change = packed.dequantize().double()
        # W as the merge has it in fp32: its own rounding is not the checkpoint's
        exact = (base[name].double() + change).float().double()
        lost[name] = (merged[name].double() - exact).square().sum().item()
        whole[name] = change.square().sum().item()
    assert summary.dtype == dtype and merged[name].dtype == getattr(torch, dtype)
    expected = sum(lost.values()) / sum(whole.values())
    assert summary.rounding_error == pytest.approx(expected, rel=1e-6)
    worst = max(lost, key=lambda name: lost[name] / whole[name])
    assert summary.worst_matrix == worst
    assert summary.worst_rounding_error == pytest.approx(lost[worst] / whole[worst], rel=1e-6)
    assert summary.worst_rounding_error > summary.rounding_error > 0


def test_fp32_keeps_what_16_bits_round_away(tmp_path):
    pair = compressed_pair()
    assert merge(pair.base, pair.delta, tmp_path / "out", dtype="float32").rounding_error == 0


def test_the_default_dtype_is_the_fine_tunes_and_stands_in_the_config(tmp_path):
    pair = compressed_pair()
    summary = merge(pair.base, pair.delta, tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert summary.dtype == "bfloat16" and summary.bytes == sum(f.stat().st_size for f in files)
    assert {t.dtype for t in checkpoint_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    merge(pair.base, pair.delta, tmp_path / "half", dtype="float16")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"


def test_large_checkpoints_are_written_in_shards_with_an_index(tmp_path, monkeypatch):
    pair = compressed_pair()
    merge(pair.base, pair.delta, tmp_path / "one", dtype="float32")
    monkeypatch.setattr(merging, "SHARD_BYTES", 60_000)
    summary = merge(pair.base, pair.delta, tmp_path / "many", dtype="float32")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 3 and len(index["weight_map"]) == summary.tensors
    assert shards == {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    one, many = (checkpoint_tensors(tmp_path / name) for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_rows_that_follow_an_unchanged_tensor_are_restored():
    pair = compressed_pair("grown")
    delta, name = read_delta(pair.delta), "model.embed_tokens.weight"
    matrices = {key: value for key, value in delta.matrices.items() if key != name}
    manifest = dataclasses.replace(delta.manifest, equal={name: ""})
    frozen = ModelDelta(matrices, delta.whole, delta.extra_rows, manifest)
    base = Checkpoint(pair.base)
    restored = dict(restore(base, frozen))[name]
    assert torch.equal(restored, torch.cat([base.read(name), delta.extra_rows[name]]))


def altered_base(pair, folder, change):
    """A copy of the base whose tensors `change` has edited."""
    shutil.copytree(pair.base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _one_bit(tensors):
    tensors["model.norm.weight"].view(torch.int16)[-1] ^= 1


def _shape(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()


def _missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("change", [_one_bit, _shape, _missing])
def test_another_base_is_refused_and_nothing_is_left(change, tmp_path):
    pair = compressed_pair()
    base = altered_base(pair, tmp_path / "other", change)
    with pytest.raises(FingerprintError, match="is not the base of this delta"):
        merge(base, pair.delta, tmp_path / "out")
    with pytest.raises(FingerprintError):
        restored_model(base, pair.delta)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_interrupted_merge_leaves_nothing(tmp_path):
    class Interrupting(Silent):
        def advance(self, steps=1):
            raise KeyboardInterrupt

    pair = compressed_pair()
    with pytest.raises(KeyboardInterrupt):
        merge(pair.base, pair.delta, tmp_path / "out", progress=Interrupting())
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(tmp_path):
    pair = compressed_pair()
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="out exists"):
        merge(pair.base, pair.delta, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_delta_without_its_config_is_refused(tmp_path):
    pair = compressed_pair()
    shutil.copytree(pair.delta, tmp_path / "delta")
    (tmp_path / "delta/config.json").unlink()
    with pytest.raises(DeltaFileError, match=r"config\.json"):
        merge(pair.base, tmp_path / "delta", tmp_path / "out")
    assert not Path(tmp_path / "out").exists()


def test_other_dtypes_are_refused(tmp_path):
    pair = compressed_pair()
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got int8"):
        merge(pair.base, pair.delta, tmp_path / "out", dtype="int8")


def test_restore_reads_the_manifest_for_what_is_equal():
    pair = compressed_pair()
    delta = read_delta(pair.delta)
    equal = [n for kind, text in delta.manifest.equal.items() for n in read_indices(kind, text)]
    names = [name for name, _ in restore(Checkpoint(pair.base), delta)]
    assert names == sorted({*delta.matrices, *delta.whole, *equal})
