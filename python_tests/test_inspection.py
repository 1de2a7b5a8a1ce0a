"""inspect: its figures are those of the files."""

import json
import shutil

import pytest
from tiny_models import VARIANTS, checkpoint_tensors, compressed_pair

from adamix.errors import DeltaFileError
from adamix.inspection import inspect
from adamix.storage.file import read_delta
from adamix.storage.log import read_log


def test_all_bytes_on_disk_are_accounted_for():
    folder = compressed_pair().delta
    found = inspect(folder)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    needed = files["delta.safetensors"] + files["delta_config.json"]
    assert found.bytes == needed
    assert found.bytes_beside == sum(files.values()) - needed
    assert found.bytes == (sum(row.bytes for row in found.kinds) + found.bytes_whole
                           + found.bytes_extra_rows + found.bytes_overhead)
    with (folder / "delta.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert found.bytes_overhead == header + files["delta_config.json"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ratio_is_of_all_tensors_that_differ(variant):
    pair = compressed_pair(variant)
    found = inspect(pair.delta)
    differing = checkpoint_tensors(pair.finetuned)  # every tensor of these pairs differs
    elements = sum(t.numel() for name, t in differing.items() if name not in found.tied)
    assert found.bytes_16bit == 2 * elements
    assert found.ratio == pytest.approx(2 * elements / found.bytes)
    assert found.extra_rows == ({} if variant != "grown" else
                                {"lm_head.weight": 5, "model.embed_tokens.weight": 5})
    assert found.tied == (["lm_head.weight"] if variant == "tied" else [])


def test_a_kind_adds_up_its_layers():
    folder = compressed_pair().delta
    delta, log = read_delta(folder), {row.name: row for row in read_log(folder)}
    found = inspect(folder)
    kind = next(row for row in found.kinds if row.kind == "model.layers.*.mlp.up_proj.weight")
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    packed = [delta.matrices[name] for name in names]
    assert (kind.tensors, kind.shape) == (2, (96, 64))
    assert kind.bytes == packed[0].nbytes + packed[1].nbytes
    assert kind.bits_per_weight == pytest.approx(8 * kind.bytes / (2 * 96 * 64))
    assert kind.mean_rank == (packed[0].rank + packed[1].rank) / 2
    assert sum(kind.v_widths.values()) == sum(kind.u_widths.values()) == 2 * kind.mean_rank
    assert kind.v_widths[3] == log[names[0]].v_bits_3 + log[names[1]].v_bits_3 > 0
    assert kind.u_widths[3] == log[names[0]].u_bits_3 + log[names[1]].u_bits_3 > 0
    errors = [log[name].relative_error for name in names]
    assert kind.mean_error == pytest.approx(sum(errors) / 2) and kind.worst_error == max(errors)


def test_totals_are_those_of_the_log():
    folder = compressed_pair().delta
    found, log = inspect(folder), read_log(folder)
    errors = {row.name: row.relative_error for row in log}
    assert found.mean_error == pytest.approx(sum(errors.values()) / len(errors))
    assert found.worst_error == max(errors.values()) == errors[found.worst_matrix]
    assert sum(row.tensors for row in found.kinds) == len(log) == 16
    assert found.bits_per_weight == pytest.approx(
        8 * sum(row.bytes for row in log) / sum(row.out_features * row.in_features for row in log))


@pytest.mark.parametrize("log", [None, "name,kind\nx,y\n"])
def test_without_a_readable_log_only_the_errors_are_missing(log, tmp_path):
    whole = inspect(compressed_pair().delta)
    shutil.copytree(compressed_pair().delta, tmp_path / "delta")
    (tmp_path / "delta/compression_log.csv").unlink()
    (tmp_path / "delta/spectra.safetensors").unlink()
    if log is not None:
        (tmp_path / "delta/compression_log.csv").write_text(log)
    found = inspect(tmp_path / "delta")
    assert found.mean_error is found.worst_error is found.worst_matrix is None
    assert all(row.mean_error is row.worst_error is None for row in found.kinds)
    assert found.bytes == whole.bytes and found.weights == whole.weights


def test_an_inspection_is_json():
    found = inspect(compressed_pair().delta)
    body = json.loads(json.dumps(found.to_dict()))
    assert body["bytes"] == found.bytes and body["ratio"] == found.ratio
    kind = found.kinds[0]
    assert body["kinds"][0]["v_widths"] == {str(b): n for b, n in kind.v_widths.items()}
    assert body["kinds"][0]["u_widths"] == {str(b): n for b, n in kind.u_widths.items()}
    assert body["config"]["bits_per_weight"] == 3.0 and body["calibration"]["source"] == "self"


def test_a_folder_that_is_no_delta_is_refused(tmp_path):
    with pytest.raises(DeltaFileError, match="is no delta"):
        inspect(tmp_path)
