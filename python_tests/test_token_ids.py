"""Token ids as calibration: used as they are given, and a sentence where they are none."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT, VOCABULARY, compressed_pair
from tiny_models import one_thread as one_thread

from adamix.calibration.texts import token_hash
from adamix.calibration.token_ids import given_ids
from adamix.config import Config
from adamix.errors import CalibrationError
from adamix.estimation import estimate
from adamix.pipeline import compress
from adamix.storage.file import read_manifest

IDS = torch.tensor([[1, 5, 7], [0, 9, 2]])


def given(source):
    return given_ids(source, vocabulary=10, longest=4)


def written(folder, ids):
    """The same ids as a tensor and in every kind of file."""
    np.save(folder / "wide.npy", ids.numpy())
    np.save(folder / "narrow.npy", ids.numpy().astype(np.uint16))
    save_file({"input_ids": ids.int(), "mask": torch.ones(1)}, folder / "named.safetensors")
    save_file({"anything": ids}, folder / "alone.safetensors")
    return [ids, ids.short(), *sorted(folder.iterdir()), str(folder / "wide.npy")]


def test_ids_are_read_from_tensors_and_files(tmp_path):
    for source in written(tmp_path, IDS):
        found = given(source)
        assert found.dtype == torch.int64 and torch.equal(found, IDS)


@pytest.mark.parametrize("text", ["text.txt", "data.jsonl", "org/name", ["a", "b"]])
def test_text_is_left_to_others(text):
    assert given(text) is None


@pytest.mark.parametrize("ids, words", [
    (IDS.float(), ["whole numbers", "float32"]), (IDS[0], ["[3]"]), (IDS[:, :1], ["[2, 1]"]),
    (IDS[:0], ["[0, 3]"]), (IDS > 0, ["bool"]), (IDS + 1, ["0..9", "1..10"]),
    (IDS - 1, ["0..9", "-1..8"]), (IDS.repeat(1, 2), ["6 tokens", "context is 4"])], ids=str)
def test_what_is_no_token_ids_of_the_model_is_refused(tmp_path, ids, words):
    save_file({"input_ids": ids.contiguous()}, tmp_path / "t.safetensors")
    for source, label in ((ids, "tensor"), (tmp_path / "t.safetensors", "t.safetensors")):
        with pytest.raises(CalibrationError) as caught:
            given(source)
        assert all(word in str(caught.value) for word in [label, *words])


@pytest.mark.parametrize("data", [None, b"", b"no such format", pickle.dumps([[1, 2]])])
@pytest.mark.parametrize("name", ["t.npy", "t.safetensors"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, data):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CalibrationError, match=name) as caught:
        given(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_several_tensors_without_input_ids_are_refused(tmp_path):
    save_file({"a": IDS, "b": IDS.clone()}, tmp_path / "t.safetensors")
    with pytest.raises(CalibrationError, match="input_ids.*it has a, b"):
        given(tmp_path / "t.safetensors")
    np.savez(tmp_path / "t.npy", a=IDS.numpy())
    (tmp_path / "t.npy.npz").rename(tmp_path / "t.npy")
    with pytest.raises(CalibrationError, match="t.npy"):
        given(tmp_path / "t.npy")


def test_compress_calibrates_with_them_all_whatever_the_config_asks_for(tmp_path):
    pair = compressed_pair()
    config = Config(bits_per_weight=3.0, bit_widths=(8, 4, 3, 2), calibration_sequences=2,
                    calibration_length=16)
    ids = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "ids.npy", ids.numpy())
    for name, source in (("a", ids), ("b", tmp_path / "ids.npy")):
        compress(pair.base, pair.finetuned, tmp_path / name, config, calibration=source, threads=1)
        used = load_file(tmp_path / name / "calibration.safetensors")["input_ids"]
        assert torch.equal(used.long(), ids)
        assert read_manifest(tmp_path / name).calibration == {
            "source": "token ids" if name == "a" else str(source), "sequences": 6, "length": 24,
            "sha256": token_hash(ids)}
    # Those of a delta calibrate another: the same tokens, and the same bytes.
    again = tmp_path / "a" / "calibration.safetensors"
    compress(pair.base, pair.finetuned, tmp_path / "c", config, calibration=again, threads=1)
    found = [(tmp_path / name / "delta.safetensors").read_bytes() for name in "abc"]
    assert found[0] == found[1] == found[2]


def test_longer_sequences_than_the_models_context_are_refused(tmp_path):
    pair, ids = compressed_pair(), torch.zeros(2, CONTEXT + 1, dtype=torch.long)
    with pytest.raises(CalibrationError, match=f"context is {CONTEXT}"):
        compress(pair.base, pair.finetuned, tmp_path / "d", calibration=ids)
    with pytest.raises(CalibrationError, match=f"context is {CONTEXT}"):
        estimate(pair.base, pair.finetuned, calibration=ids)
