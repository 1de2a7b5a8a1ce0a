"""A compression that was killed goes on: the same bytes, nothing done twice, nothing mixed up."""

import errno
import fcntl
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_pipeline import CONFIG, OPTIONS, SAME, assert_same_files
from tiny_models import compressed_pair, make_pair
from tiny_models import one_thread as one_thread
from typer.testing import CliRunner

from adamix import matrices, pipeline, tokens
from adamix.__main__ import app
from adamix.config import Config
from adamix.errors import OutputError, ResumeError
from adamix.pipeline import compress
from adamix.storage import file as storage
from adamix.storage.log import read_log
from adamix.storage.work import work_path

pytestmark = pytest.mark.usefixtures("without_gpu")

SMALL = ["--bits", "3", "--widths", "8,4,3,2", "--sequences", "8", "--length", "32"]
MATRICES = 16  # of compressed_pair()


def finished(out):
    return sorted((work_path(out) / "matrices").glob("*.safetensors"))


def interrupt_after(count, pair, out, monkeypatch, error=KeyboardInterrupt, **options):
    """Compress until `count` matrices have begun, then raise; the calls of both kinds of work."""
    quantize, begun = matrices.quantize_matrix, []

    def interrupted(*arguments, **named):
        begun.append(1)
        if len(begun) > count:
            raise error
        return quantize(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(matrices, "quantize_matrix", interrupted)
        with pytest.raises(error):
            compress(pair.base, pair.finetuned, out, options.pop("config", CONFIG), threads=1,
                     **options)
    assert not out.exists()


def counted(monkeypatch, module, name):
    calls, function = [], getattr(module, name)

    def spy(*arguments, **named):
        calls.append(1)
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, spy)
    return calls


def log_without_seconds(folder):
    return [line.rsplit(",", 1)[0]
            for line in (folder / "compression_log.csv").read_text().splitlines()]


# --- killed ------------------------------------------------------------------------------------


def kill_when(reached, pair, out, threads):
    """Run the command line and kill it as soon as reached() holds; False if it ended before."""
    command = [sys.executable, "-m", "adamix", "compress", pair.base, pair.finetuned, "-o", out,
               *SMALL, "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 120
        while not reached() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.0005)
    finally:
        process.kill()
        error = process.communicate()[1].decode()
    assert process.returncode in (0, -9), error
    return process.returncode == -9


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path):
    pair, out = compressed_pair(), tmp_path / "deltas" / "d"
    assert kill_when(lambda: (work_path(out) / "calibration.safetensors").exists(), pair, out, 1)
    done = []
    for count, threads in ((1, 1), (4, 2), (9, 2)):
        kill_when(lambda count=count: len(finished(out)) >= count, pair, out, threads)
        assert set(done) <= set(finished(out)) or out.exists()
        done = finished(out)
    if not out.exists():
        summary = compress(pair.base, pair.finetuned, out, CONFIG, threads=2)
        assert summary.resumed == len(done) >= 9
    assert_same_files(out, pair.delta)
    assert log_without_seconds(out) == log_without_seconds(pair.delta)
    assert [path.name for path in out.parent.iterdir()] == ["d"]
    assert {path.name for path in out.iterdir()} == {path.name for path in pair.delta.iterdir()}


# --- gone on with ------------------------------------------------------------------------------


def test_nothing_is_done_twice(tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"
    interrupt_after(5, pair, out, monkeypatch)
    kept = finished(out)
    assert 0 < len(kept) <= 5 and (work_path(out) / "calibration.safetensors").exists()
    assert len(read_log(work_path(out))) == len(kept)
    quantized = counted(monkeypatch, matrices, "quantize_matrix")
    sampled = counted(monkeypatch, tokens, "sample")
    summary = compress(pair.base, pair.finetuned, out, CONFIG, threads=1)
    assert (len(quantized), len(sampled)) == (MATRICES - len(kept), 0)
    assert summary.resumed == len(kept) and len(summary.rows) == MATRICES
    assert_same_files(out, pair.delta)
    assert not work_path(out).exists()


@pytest.mark.parametrize("variant", ["tied", "grown"])
def test_other_kinds_of_models_go_on_too(tmp_path, monkeypatch, variant):
    pair, out = compressed_pair(variant), tmp_path / "d"
    interrupt_after(MATRICES - 2, pair, out, monkeypatch)
    compress(pair.base, pair.finetuned, out, CONFIG, threads=1)
    assert_same_files(out, pair.delta)


def test_given_text_is_read_again_and_must_be_the_same(tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"
    texts = [f"document {i} says {i * i}" for i in range(30)]
    interrupt_after(3, pair, out, monkeypatch, calibration=texts)
    with pytest.raises(ResumeError, match="calibration sha256 was"):
        compress(pair.base, pair.finetuned, out, CONFIG, threads=1, calibration=texts[::-1])
    assert compress(pair.base, pair.finetuned, out, CONFIG, threads=1,
                    calibration=texts).resumed > 0


def test_a_damaged_file_counts_as_not_finished(tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"
    interrupt_after(5, pair, out, monkeypatch)
    first, second, *rest = finished(out)
    first.write_bytes(first.read_bytes()[:-40])
    second.write_bytes(b"")
    (work_path(out) / "calibration.safetensors").write_bytes(b"no tensors")
    assert compress(pair.base, pair.finetuned, out, CONFIG, threads=1).resumed == len(rest)
    assert_same_files(out, pair.delta)


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_tensors", full)
        with pytest.raises(OutputError, match="full: what is finished is kept"):
            compress(pair.base, pair.finetuned, out, CONFIG, threads=1)
    assert compress(pair.base, pair.finetuned, out, CONFIG, threads=1).resumed == MATRICES
    assert_same_files(out, pair.delta)


# --- refused -----------------------------------------------------------------------------------


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change, words", [
    (dict(passes=3), "config passes was 4 and is 3 now"),
    (dict(bits_per_weight=2.5), "config bits_per_weight was 3.0 and is 2.5 now"),
    (dict(seed=1), "config seed was 0 and is 1 now")])
def test_the_work_of_another_configuration_is_refused(tmp_path, monkeypatch, change, words):
    pair, out = compressed_pair(), tmp_path / "d"
    interrupt_after(3, pair, out, monkeypatch)
    before = snapshot(tmp_path)
    with pytest.raises(ResumeError) as caught:
        compress(pair.base, pair.finetuned, out, Config(**{**OPTIONS, **change}), threads=1)
    assert words in str(caught.value) and "--restart" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_the_work_on_other_weights_is_refused(tmp_path, monkeypatch, side):
    base, finetuned = make_pair(tmp_path)
    pair, out = compressed_pair(), tmp_path / "d"
    pair = type(pair)(base, finetuned, out)
    interrupt_after(3, pair, out, monkeypatch)
    file = getattr(pair, side) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][40, 7] += 0.125  # one element of 6144
    save_file(tensors, file, metadata={"format": "pt"})
    label = {"base": "base", "finetuned": "fine-tune"}[side]
    with pytest.raises(ResumeError, match=f"{label} sha256 was"):
        compress(base, finetuned, out, CONFIG, threads=1)
    summary = compress(base, finetuned, out, CONFIG, threads=1, restart=True)
    assert summary.resumed == 0


def test_restart_throws_the_work_away(tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"
    interrupt_after(3, pair, out, monkeypatch, config=Config(**OPTIONS, seed=1))
    summary = compress(pair.base, pair.finetuned, out, CONFIG, threads=1, restart=True)
    assert summary.resumed == 0
    assert_same_files(out, pair.delta)


def test_two_runs_do_not_share_a_work_folder(tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"
    interrupt_after(3, pair, out, monkeypatch)
    before = snapshot(tmp_path)
    with (work_path(out) / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ResumeError, match="another process"):
            compress(pair.base, pair.finetuned, out, CONFIG, threads=1, restart=True)
    assert snapshot(tmp_path) == before


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    pair, out = compressed_pair(), tmp_path / "d"
    work_path(out).mkdir()
    (work_path(out) / "mine").write_text("mine")
    with pytest.raises(ResumeError, match="no work folder of adamix"):
        compress(pair.base, pair.finetuned, out, CONFIG, threads=1, restart=True)
    assert snapshot(tmp_path) == {work_path(out) / "mine": b"mine"}


def test_what_is_left_of_a_folder_that_was_being_removed_is_taken_up(tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"
    interrupt_after(3, pair, out, monkeypatch)
    for name in ("lock", "fingerprint.json"):
        (work_path(out) / name).unlink()
    assert compress(pair.base, pair.finetuned, out, CONFIG, threads=1).resumed == 0
    assert_same_files(out, pair.delta)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


# --- the command line --------------------------------------------------------------------------


def test_the_command_line_says_how_to_go_on(tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"
    interrupt_after(3, pair, out, monkeypatch)
    kept = len(finished(out))
    command = ["compress", str(pair.base), str(pair.finetuned), "-o", str(out), *SMALL]
    with monkeypatch.context() as patch:
        def interrupted(*arguments, **named):
            raise KeyboardInterrupt

        patch.setattr(pipeline, "survey", interrupted)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    line = next(line for line in result.stderr.splitlines() if "finished" in line)
    assert line == (f"adamix: {kept} finished matrices are kept in {work_path(out)}: the same "
                    f"command goes on from there, with --restart it starts over")
    result = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert result.exit_code == 1 and result.stderr.count("--restart") == 1
    assert "seed was 0 and is 1 now" in result.stderr
    result = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(result.stdout)["resumed"] == kept
    assert_same_files(out, pair.delta)


def test_restart_is_an_option(tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"
    interrupt_after(3, pair, out, monkeypatch, config=Config(**OPTIONS, seed=1))
    shutil.copytree(work_path(out), tmp_path / "copy")
    command = ["compress", str(pair.base), str(pair.finetuned), "-o", str(out), *SMALL]
    assert CliRunner().invoke(app, [*command, "--restart"]).exit_code == 0
    assert all((out / name).read_bytes() == (Path(pair.delta) / name).read_bytes() for name in SAME)
