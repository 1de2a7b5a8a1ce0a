"""The delta folder: golden names, round trips, shards, and one sentence for each fault."""

import errno
import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, compressed_pair
from tiny_models import one_thread as one_thread

from adamix import ops
from adamix.artifacts import Manifest, ModelDelta, PackedDelta
from adamix.errors import DeltaFileError, OutputError
from adamix.storage import file as storage
from adamix.storage.file import (
    delta_bytes,
    delta_tensors,
    new_folder,
    read_delta,
    write_delta,
)

UP = "model.layers.*.up.weight"
DELTA, CONFIG, INDEX = "delta.safetensors", "delta_config.json", "delta.safetensors.index.json"


COUNTS = [((0, 0, 1, 0, 0, 2, 0, 0), (0, 0, 0, 0, 2, 1, 0, 0)),  # of V, of U
          ((1, 0, 0, 0, 0, 0, 3, 1), (1, 0, 0, 0, 2, 0, 2, 0)),
          ((0, 0, 0, 0, 1, 0, 0, 0), (0, 0, 0, 1, 0, 0, 0, 0))]


def packed(out, n, counts, seed):
    generator = torch.Generator().manual_seed(seed)
    length = ops.v_words(n, counts[0]) + ops.u_words(out, counts[1])
    words = torch.randint(-2**31, 2**31, (length,), generator=generator).to(torch.int32)
    return PackedDelta(words, torch.rand(sum(counts[0]), generator=generator), *counts, (out, n))


def small_delta():
    """Two layers of one kind, a head, norms, a scalar of another dtype, and extra rows."""
    matrices = {"model.layers.0.up.weight": packed(40, 33, COUNTS[0], 0),
                "model.layers.1.up.weight": packed(40, 33, COUNTS[1], 1),
                "lm_head.weight": packed(50, 33, COUNTS[2], 2)}
    whole = {"model.layers.0.norm.weight": torch.rand(33).bfloat16(),
             "model.layers.1.norm.weight": torch.rand(33).bfloat16(),
             "steps": torch.tensor(7)}
    manifest = Manifest(
        base="org/base", finetuned="/models/ä", dtype="bfloat16",
        fingerprint={"sha256": "ab", "sampled": "cd"}, config={"ratio": 16.0},
        calibration={"source": "self"},
        compressed={UP: (40, 33, "0-1"), "lm_head.weight": (50, 33, "")},
        whole={"model.layers.*.norm.weight": "0-1", "steps": ""}, extra_rows=["lm_head.weight"],
        tied=[], equal={"model.layers.*.down.weight": "0-1"}, absent=["old.weight"])
    return ModelDelta(matrices, whole, {"lm_head.weight": torch.rand(2, 33).bfloat16()}, manifest)


def assert_same(got, expected):
    assert got.manifest == expected.manifest
    assert got.matrices.keys() == expected.matrices.keys()
    for name, matrix in expected.matrices.items():
        other = got.matrices[name]
        assert (other.v_counts, other.u_counts, other.shape) == (
            matrix.v_counts, matrix.u_counts, matrix.shape)
        assert torch.equal(other.words, matrix.words) and torch.equal(other.scales, matrix.scales)
    for ours, theirs in ((got.whole, expected.whole), (got.extra_rows, expected.extra_rows)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
                   for name in theirs)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "delta").mkdir()
    write_delta(small_delta(), tmp_path / "delta")
    return tmp_path / "delta"


# --- what is written ---------------------------------------------------------------------------


def test_names_shapes_and_dtypes_of_the_file(folder):
    tensors = load_file(folder / DELTA)
    words = [ops.v_words(33, v_counts) + ops.u_words(40, u_counts)
             for v_counts, u_counts in COUNTS[:2]]
    assert {name: (list(t.shape), t.dtype) for name, t in tensors.items()} == {
        f"{UP}.words": ([sum(words)], torch.int32), f"{UP}.scales": ([8], torch.float32),
        f"{UP}.counts": ([2, 16], torch.int32),
        "lm_head.weight.words": ([2 * 4 + 2 * 5], torch.int32),
        "lm_head.weight.scales": ([1], torch.float32),
        "lm_head.weight.counts": ([1, 16], torch.int32),
        "whole:model.layers.*.norm.weight": ([2, 33], torch.bfloat16),
        "whole:steps": ([1], torch.int64), "rows:lm_head.weight": ([2, 33], torch.bfloat16)}
    assert tensors[f"{UP}.counts"].tolist()[1] == [1, 0, 0, 0, 0, 0, 3, 1, 1, 0, 0, 0, 2, 0, 2, 0]
    assert words == [2 * (6 + 3 + 3) + 2 * (4 + 4 + 3),
                     2 * (8 + 3 * 2 + 1) + 2 * (8 + 2 * 4 + 2 * 2)]
    delta = small_delta()
    assert delta.nbytes == sum(t.nbytes for t in tensors.values())
    assert delta_bytes(folder) == sum(p.stat().st_size for p in folder.iterdir())


def test_the_config_says_its_versions_and_keeps_one_line_an_entry(folder):
    text = (folder / CONFIG).read_text()
    body = json.loads(text)
    assert (body["format"], body["format_version"], body["layout_version"]) == (
        "adamix", 3, ops.LAYOUT_VERSION)
    assert f'  "{UP}": [40, 33, "0-1"],\n' in text and text.endswith("]\n}\n")
    assert body["finetuned"] == "/models/ä"
    assert body["equal"] == {"model.layers.*.down.weight": "0-1"}


def test_a_small_delta_round_trips_and_is_written_the_same_twice(folder, tmp_path):
    read = read_delta(folder)
    for matrix in read.matrices.values():
        assert matrix.dequantize().abs().sum() > 0
    torch.manual_seed(0)
    again = tmp_path / "again"
    again.mkdir()
    write_delta(read, again)
    assert_same(read_delta(again), read)
    for name in (DELTA, CONFIG):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_read_is_what_was_written(tmp_path):
    torch.manual_seed(1)
    delta = small_delta()
    write_delta(delta, tmp_path)
    assert_same(read_delta(tmp_path), delta)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_real_delta_round_trips_in_shards_too(variant, tmp_path):
    delta = read_delta(compressed_pair(variant).delta)
    size = write_delta(delta, tmp_path, shard_bytes=9000)
    shards = sorted(path.name for path in tmp_path.glob("delta-*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"delta-00001-of-{len(shards):05}.safetensors"
    assert not (tmp_path / DELTA).exists() and (tmp_path / INDEX).exists()
    assert size == delta_bytes(tmp_path) == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert_same(read_delta(tmp_path), delta)
    (tmp_path / shards[1]).unlink()
    refused(tmp_path)


def test_tensors_are_grouped_by_kind_in_the_order_of_their_numbers():
    delta = small_delta()
    backwards = replace(delta, matrices=dict(reversed(delta.matrices.items())),
                        whole=dict(reversed(delta.whole.items())))
    ours, theirs = delta_tensors(delta), delta_tensors(backwards)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- broken folders ----------------------------------------------------------------------------


def refused(folder, *words):
    with pytest.raises(DeltaFileError) as caught:
        read_delta(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    for word in words:
        assert word in message


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 500, -200, -3, -1])
def test_a_truncated_file_is_refused(folder, keep):
    data = (folder / DELTA).read_bytes()
    (folder / DELTA).write_bytes(data[:keep])
    refused(folder, DELTA)


@pytest.mark.parametrize("keep", [0, 1, 50, -3])
def test_a_truncated_config_is_refused(folder, keep):
    (folder / CONFIG).write_bytes((folder / CONFIG).read_bytes()[:keep])
    refused(folder, CONFIG)


def test_missing_and_foreign_files_are_refused(folder, tmp_path):
    refused(tmp_path / "nothing", "nothing")
    refused(folder / DELTA)
    (folder / CONFIG).rename(tmp_path / CONFIG)
    refused(folder, CONFIG)
    (tmp_path / CONFIG).rename(folder / CONFIG)
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.ones(2)}, folder / DELTA, metadata=metadata)
        refused(folder, DELTA, "not written by adamix")
    (folder / DELTA).unlink()
    refused(folder, "missing")


def edit(**changes):
    return lambda tensors, body: body.update(changes)


def retype(name, change):
    return lambda tensors, body: tensors.update({name: change(tensors[name])})


def drop(name):
    return lambda tensors, body: tensors.pop(name)


def forget(key):
    return lambda tensors, body: body.pop(key)


def recount(row, column, by):
    def change(tensors, body):
        tensors[f"{UP}.counts"][row, column] += by
    return change


KINDS = {UP: [40, 33, "0-1"], "lm_head.weight": [50, 33, ""]}
BROKEN = {
    "other format": (edit(format="gguf"), ["gguf"]),
    "newer format": (edit(format_version=5), ["format_version 5", "reads 3"]),
    "older format": (edit(format_version=1), ["format_version 1", "reads 3", "compress again"]),
    "newer layout": (edit(layout_version=99), ["layout_version 99"]),
    "older layout": (edit(layout_version=1), ["layout_version 1, this adamix reads 3"]),
    "no fingerprint": (forget("fingerprint"), [CONFIG, "fingerprint"]),
    "no kinds": (forget("compressed"), ["compressed"]),
    "kinds as a list": (edit(compressed=[]), []),
    "kind of two": (edit(compressed={**KINDS, UP: [40, 33]}), []),
    "text for a size": (edit(compressed={**KINDS, UP: ["x", 33, "0-1"]}), []),
    "null for kinds": (edit(compressed=None), []),
    "whole as a list": (edit(whole=["steps"]), []),
    "number for rows": (edit(extra_rows=3), []),
    "one layer more": (edit(compressed={**KINDS, UP: [40, 33, "0-2"]}), []),
    "one layer less": (edit(compressed={**KINDS, UP: [40, 33, "0"]}), []),
    "no layer": (edit(compressed={**KINDS, UP: [40, 33, "x"]}), []),
    "other out": (edit(compressed={**KINDS, UP: [65, 33, "0-1"]}), ["65 x 33"]),
    "other in": (edit(compressed={**KINDS, UP: [40, 65, "0-1"]}), ["40 x 65"]),
    "negative out": (edit(compressed={**KINDS, UP: [-40, 33, "0-1"]}), []),
    "unknown kind": (edit(compressed={**KINDS, "ghost": [4, 4, ""]}), ["ghost"]),
    "kind left out": (edit(compressed={UP: KINDS[UP]}), ["lm_head.weight"]),
    "unknown whole": (edit(whole={"ghost": ""}), ["ghost"]),
    "one norm more": (edit(whole={"model.layers.*.norm.weight": "0-2", "steps": ""}), []),
    "unknown rows": (edit(extra_rows=["lm_head.weight", "ghost"]), ["ghost"]),
    "rows left out": (edit(extra_rows=[]), ["rows:lm_head.weight"]),
    "no words": (drop(f"{UP}.words"), [f"{UP}.words"]),
    "no scales": (drop(f"{UP}.scales"), [f"{UP}.scales"]),
    "no counts": (drop(f"{UP}.counts"), [f"{UP}.counts"]),
    "no norms": (drop("whole:model.layers.*.norm.weight"), ["whole:model.layers.*.norm.weight"]),
    "a tensor more": (lambda tensors, body: tensors.update(x=torch.ones(2)), ["x"]),
    "a row of V more": (recount(0, 5, 1), ["layers.0.up", "V's rows", "U's columns"]),
    "a row of V less": (recount(1, 6, -1), ["layers.1.up", "V's rows", "U's columns"]),
    "a column of U more": (recount(1, 15, 1), ["layers.1.up", "V's rows", "U's columns"]),
    "a component more": (recount(0, (5, 12), 1), ["40 x 33"]),
    "a component less": (recount(1, (6, 14), -1), [UP, "counts"]),
    "a negative count": (recount(0, (0, 8), -1), ["layers.0"]),
    "a negative count of U": (recount(0, (8, 12), torch.tensor([-1, 1])), ["layers.0"]),
    "a huge count": (recount(0, (5, 13), 2**31 - 9), []),
    "a word more": (retype(f"{UP}.words", lambda t: torch.cat([t, t[:1]])), [UP, "words"]),
    "a word less": (retype(f"{UP}.words", lambda t: t[:-1].clone()), []),
    "a scale less": (retype(f"{UP}.scales", lambda t: t[:-1].clone()), []),
    "words of 64 bits": (retype(f"{UP}.words", lambda t: t.long()), [UP, "int32", "int64"]),
    "words as floats": (retype(f"{UP}.words", lambda t: t.view(torch.float32)), [UP, "int32"]),
    "scales of 16 bits": (retype(f"{UP}.scales", lambda t: t.half()), [UP, "float16"]),
    "scales of 64 bits": (retype(f"{UP}.scales", lambda t: t.double()), [UP, "float64"]),
    "counts as floats": (retype(f"{UP}.counts", lambda t: t.float()), []),
    "counts of 64 bits": (retype(f"{UP}.counts", lambda t: t.long()), []),
    "counts in a row": (retype(f"{UP}.counts", lambda t: t[0].clone()), []),
    "counts of V alone": (retype(f"{UP}.counts", lambda t: t[:, :8].clone()), ["layers.0"]),
    "counts of seventeen": (retype(f"{UP}.counts", lambda t: torch.cat([t, t[:, :1]], 1)), []),
    "words in two rows": (retype(f"{UP}.words", lambda t: t.view(2, -1).clone()), []),
    "scales in two rows": (retype(f"{UP}.scales", lambda t: t.view(2, -1).clone()), []),
    "a norm for all": (retype("whole:steps", lambda t: t[0].clone()), []),
}


@pytest.mark.parametrize("change, words", BROKEN.values(), ids=list(BROKEN))
def test_parts_that_disagree_are_refused_in_one_sentence(folder, change, words):
    tensors, body = load_file(folder / DELTA), json.loads((folder / CONFIG).read_text())
    change(tensors, body)
    save_file(tensors, folder / DELTA, metadata={"format": "adamix"})
    (folder / CONFIG).write_text(json.dumps(body))
    refused(folder, *words)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", '"adamix"', "\xff"])
def test_a_config_that_is_none_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    refused(folder, CONFIG)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"weight_map": 3}', '{"weight_map": {}}',
                                  '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "gone"}}'])
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder)


# --- the folder itself -------------------------------------------------------------------------

FULL = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)")]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "a" / "out") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
        assert partial.parent == tmp_path / "a"  # one file system, so that the rename is atomic
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x"),
                                   SystemExit(2)], ids=repr)
def test_nothing_is_left_after_an_error_which_passes_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as caught, new_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
        raise error
    assert caught.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path, monkeypatch, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(storage, "save_tensors", full)
    with pytest.raises(OutputError, match="full"), new_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
        write_delta(small_delta(), partial)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_really_full_leaves_nothing(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(tmp_path)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("a file system of 16 KiB cannot be mounted here")
    try:
        delta = read_delta(compressed_pair().delta)
        with pytest.raises(OutputError, match="full"), new_folder(tmp_path / "out") as partial:
            write_delta(delta, partial)
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_an_output_that_exists_is_refused_and_left_as_it_is(tmp_path, kind):
    out = tmp_path / "out"
    make = {"folder": out.mkdir, "file": out.touch, "link to nothing": lambda: out.symlink_to("x")}
    make[kind]()
    with pytest.raises(OutputError, match="out exists"), new_folder(out):
        raise AssertionError("begun")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_appears_meanwhile_is_left_as_it_is(tmp_path, kind):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="out"), new_folder(out) as partial:
        (partial / "x").write_text("ours")
        if kind == "folder":
            out.mkdir()
            (out / "x").write_text("theirs")
        else:
            out.write_text("theirs")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "x" if kind == "folder" else out).read_text() == "theirs"


def test_a_parent_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError) as caught, new_folder(out):
            raise AssertionError("begun")
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_the_right_to_write_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="locked"), new_folder(tmp_path / "locked" / "out"):
        raise AssertionError("begun")
