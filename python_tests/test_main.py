"""The command line: figures that match the files, one line an error, exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import compressed_pair, make_pair
from tiny_models import one_thread as one_thread
from typer.testing import CliRunner

from adamix import pipeline
from adamix.__main__ import app
from adamix.config import Config
from adamix.display import bytes_text, percent_text, seconds_text
from adamix.inspection import inspect
from adamix.storage.file import delta_bytes, read_manifest
from adamix.storage.log import read_log
from adamix.version import __version__

pytestmark = pytest.mark.usefixtures("without_gpu")

SMALL = ["--bits", "3", "--widths", "8,4,3,2", "--sequences", "8", "--length", "32",
         "--threads", "1"]  # what compressed_pair() does


@pytest.fixture(autouse=True)
def loud_transformers():
    """The command line silences transformers for its own process: undo it after each test."""
    yield
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def json_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """`compress --json`: its folder and what it printed."""
    pair, out = compressed_pair(), tmp_path_factory.mktemp("main") / "delta"
    return out, call("compress", pair.base, pair.finetuned, "-o", out, *SMALL, "--json")


def test_compress_writes_the_delta_that_the_library_does(compressed):
    out, result = compressed
    body = json_of(result)
    ours, theirs = (load_file(folder / "delta.safetensors") for folder in
                    (out, compressed_pair().delta))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    log = read_log(out)
    assert body["bytes"] == delta_bytes(out) and body["matrices"] == len(log)
    assert body["ratio"] == pytest.approx(body["bytes_16bit"] / body["bytes"])
    errors = {row.name: row.relative_error for row in log}
    assert body["mean_error"] == pytest.approx(sum(errors.values()) / len(errors), rel=1e-5)
    assert body["worst_error"] == pytest.approx(errors[body["worst_matrix"]], rel=1e-5)
    assert body["bytes_beside"] == sum(p.stat().st_size for p in out.iterdir()) - body["bytes"]
    assert body["peak_bytes"] > 2**20 and "calibration and compression" in body["seconds"]


def test_progress_goes_to_stderr_as_plain_lines_without_a_terminal(compressed):
    lines = compressed[1].stderr.splitlines()
    assert any(line.startswith("calibrating and compressing: 16/16 in ") for line in lines)
    assert not any("\x1b" in line or "Loading weights" in line for line in lines)


def test_compress_prints_a_summary_for_people(tmp_path, monkeypatch):
    pair = compressed_pair()
    rows = read_log(pair.delta)
    summary = pipeline.Summary(pair.delta, rows, 9_543, 152_690, {"wte": 2048}, 3000,
                               {"read": 61.0}, 2**30)
    monkeypatch.setattr(pipeline, "compress", lambda *args, **kwargs: summary)
    printed = call("compress", "a", "b", "-o", tmp_path / "out").stdout
    assert "9.32 KiB, everything counted: 1/16.00 of the 149.1 KiB that differ" in printed
    assert "1 tensors, 2.00 KiB, the largest wte" in printed
    assert "2.93 KiB of logs and copies" in printed and "1.00 GiB" in printed
    assert "read 1 min 1 s" in printed and "k_proj" in printed


def test_every_choice_of_the_configuration_can_be_switched(tmp_path, monkeypatch):
    seen = {}

    def stub(base, finetuned, out, config, **rest):
        seen.update(config=config, **rest)
        return pipeline.Summary(Path(out), [], 1, 1, {}, 1, {}, 1)

    monkeypatch.setattr(pipeline, "compress", stub)
    result = call("compress", "a", "b", "-o", tmp_path / "out", "--ratio", "8", "--preset", "paper",
                  "--calibration", "text.txt", "--sequences", "3", "--length", "5", "--seed", "7",
                  "--threads", "2", "--passes", "3", "--widths", "8,2", "--max-widths", "3",
                  "--decomposition", "output-aware", "--objective", "v+u", "--no-correction",
                  "--solver", "cbc", "--allocate", "model", "--damping", "0.02",
                  "--svd-damping", "0.3", "--no-unbiased", "--gain", "1.2", "--no-embeddings",
                  "--no-separate-widths", "--no-vision", "--json")
    json_of(result)
    assert seen["config"] == Config(
        ratio=8.0, bit_widths=(8, 2), max_widths=3, decomposition="output-aware", objective="v+u",
        separate_widths=False, correction=False, passes=3, damping=0.02, svd_damping=0.3,
        unbiased=False, gain=1.2, solver="cbc", allocate="model", embeddings=False, vision=False,
        calibration_sequences=3, calibration_length=5, seed=7)
    assert (seen["calibration"], seen["threads"]) == ("text.txt", 2)
    call("compress", "a", "b", "-o", tmp_path / "out", "--preset", "paper")
    assert seen["config"] == Config.preset("paper")
    call("compress", "a", "b", "-o", tmp_path / "out", "--bits", "0.5")
    assert seen["config"] == Config(bits_per_weight=0.5)


def test_inspect_shows_the_files_figures_and_draws(tmp_path):
    folder = compressed_pair().delta
    body = json_of(call("inspect", folder, "--json", "--plot", tmp_path / "plots"))
    found = inspect(folder)
    assert body["bytes"] == delta_bytes(folder) and body["ratio"] == found.ratio
    assert [row["bytes"] for row in body["kinds"]] == [row.bytes for row in found.kinds]
    assert [Path(path).exists() for path in body["plots"]] == [True, True]
    printed = call("inspect", folder).stdout
    assert f"{bytes_text(found.bytes)} ({found.bytes} bytes)" in printed
    assert "layers.*.mlp.up_proj" in printed and percent_text(found.worst_error) in printed


def test_evaluate_shows_the_models_side_by_side(tmp_path):
    pair = compressed_pair()
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab", "answer": "c"}\n' * 3)
    (tmp_path / "t.txt").write_text("a text of some words\n" * 3)
    body = json_of(call("evaluate", pair.base, pair.finetuned, pair.delta, "--prompts",
                        tmp_path / "p.jsonl", "--text", tmp_path / "t.txt", "--limit", "2",
                        "--max-new-tokens", "2", "--json"))
    assert body["prompts"] == 2 and body["text_tokens"] == 63
    assert 0 < body["compressed"]["kl_text"] < body["base"]["kl_text"]
    assert body["finetuned"]["perplexity"] > 1 and body["finetuned"]["kl_text"] is None
    printed = call("evaluate", pair.base, pair.finetuned, "--text", tmp_path / "t.txt").stdout
    line = next(line for line in printed.splitlines() if "perplexity (63 tokens)" in line)
    assert line.split()[-1] == "-"  # no delta was given
    assert line.split()[-3:-1] == [f"{body[name]['perplexity']:.4g}"
                                   for name in ("base", "finetuned")]


def test_merge_writes_a_checkpoint_that_generate_can_use(tmp_path):
    pair, out = compressed_pair(), tmp_path / "out"
    body = json_of(call("merge", pair.base, pair.delta, "-o", out, "--dtype", "float32", "--json"))
    assert body["bytes"] == (out / "model.safetensors").stat().st_size
    assert body["dtype"] == "float32" and body["rounding_error"] == 0
    options = ["--max-new-tokens", "6", "--json"]
    added = json_of(call("generate", pair.base, "ab", "cd ef", "--delta", pair.delta, *options))
    merged = json_of(call("generate", out, "ab", "cd ef", *options))
    assert [g["text"] for g in added["generations"]] == [g["text"] for g in merged["generations"]]
    assert [g["prompt"] for g in added["generations"]] == ["ab", "cd ef"]
    printed = call("generate", out, "ab", "--max-new-tokens", "6").stdout
    assert printed == f"ab{merged['generations'][0]['text']}\n"
    printed = call("merge", pair.base, pair.delta, "-o", tmp_path / "half").stdout
    assert "rounding to bfloat16 adds" in printed and "of ‖Δ̂‖²" in printed


def test_generate_names_its_models():
    pair, options = compressed_pair(), ["--max-new-tokens", "4"]
    deltas = ["--delta", f"x={pair.delta}", "--delta", pair.delta]
    lines = call("generate", pair.base, "ab", *deltas, "--with-base", *options).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["[base]", "[x]", "[delta]"]
    body = json_of(call("generate", pair.base, "ab", *deltas, *options, "--json"))
    assert [g["finetune"] for g in body["generations"]] == ["x", "delta"]
    twice = call("generate", pair.base, "ab", "--delta", pair.delta, "--delta", pair.delta)
    assert twice.exit_code == 2 and "two deltas are called delta" in twice.output


def test_sampling_follows_the_seed():
    options = ["--max-new-tokens", "12", "--temperature", "1.5", "--seed"]
    texts = [call("generate", compressed_pair().base, "ab", *options, seed).stdout
             for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def altered(tmp_path, change):
    folder = tmp_path / "delta"
    shutil.copytree(compressed_pair().delta, folder)
    change(folder)
    return folder


def _foreign(folder):
    (folder / "delta_config.json").write_text('{"format": "other"}')


def _truncated(folder):
    file = folder / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _other_version(folder):
    body = json.loads((folder / "delta_config.json").read_text())
    (folder / "delta_config.json").write_text(json.dumps(body | {"format_version": 99}))


def refused(result, *words):
    """One line on stderr, exit code 1, no traceback, nothing on stdout."""
    assert result.exit_code == 1 and result.stdout == "", result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("adamix: error: ") and "Traceback" not in result.stderr
    assert result.stderr.count("adamix: error: ") == 1
    assert all(word in last for word in words), last


@pytest.mark.parametrize(("change", "word"), [(_foreign, "not an adamix delta"),
                                              (_truncated, "damaged or truncated"),
                                              (_other_version, "format_version 99")])
def test_a_bad_delta_is_refused_by_every_command(change, word, tmp_path):
    pair, folder = compressed_pair(), altered(tmp_path, change)
    (tmp_path / "t.txt").write_text("a text")
    refused(call("inspect", folder), word)
    refused(call("merge", pair.base, folder, "-o", tmp_path / "out", "--json"), word)
    refused(call("generate", pair.base, "ab", "--delta", folder), word)
    refused(call("evaluate", pair.base, pair.finetuned, folder, "--text", tmp_path / "t.txt"), word)
    assert not (tmp_path / "out").exists()


def test_missing_and_existing_folders_are_named(tmp_path):
    pair, missing = compressed_pair(), tmp_path / "missing"
    refused(call("compress", missing, pair.finetuned, "-o", tmp_path / "out"), "is no folder")
    refused(call("compress", pair.base, pair.finetuned, "-o", tmp_path), "exists")
    refused(call("inspect", missing), "missing is no delta")
    refused(call("merge", pair.base, pair.delta, "-o", tmp_path), "exists")
    refused(call("merge", pair.base, missing, "-o", tmp_path / "out"), "missing is no delta")
    refused(call("generate", missing, "ab"), "missing is no folder")
    refused(call("evaluate", pair.base, pair.finetuned, "--text", missing), "is no file")
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused(tmp_path):
    base, _ = make_pair(tmp_path, seed=1)
    refused(call("merge", base, compressed_pair().delta, "-o", tmp_path / "out"),
            "is not the base of this delta")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [
    ["compress", "a", "b"], ["compress", "a", "b", "-o", "c", "--ratio", "8", "--bits", "1"],
    ["compress", "a", "b", "-o", "c", "--widths", "9"],
    ["compress", "a", "b", "-o", "c", "--widths", "two"],
    ["compress", "a", "b", "-o", "c", "--solver", "none"], ["evaluate", "a", "b"],
    ["merge", "a", "b", "-o", "c", "--dtype", "int8"], ["generate", "a"], ["nonsense"],
    ["inspect", "a", "--no-such-option"],
])
def test_wrong_usage_exits_with_2(arguments):
    result = call(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert "Usage" in result.stderr and "Traceback" not in result.stderr


def test_ctrl_c_is_one_line_and_130(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "compress", interrupted)
    result = call("compress", "a", "b", "-o", "c")
    assert result.exit_code == 130 and result.stderr == "adamix: error: interrupted\n"


def test_the_version_is_printed():
    assert call("--version").stdout == f"adamix {__version__}\n"


def test_python_m_adamix_reports_a_fault_in_one_line(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-m", "adamix", "inspect", tmp_path], check=False,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (f"adamix: error: {tmp_path} is no delta: "
                           "it has no delta_config.json\n")


def test_numbers_have_sensible_units():
    assert [bytes_text(n) for n in (0, 1023, 1536, 2**20, 150 * 2**20, 3 * 2**40)] == [
        "0 B", "1023 B", "1.50 KiB", "1.00 MiB", "150.0 MiB", "3.00 TiB"]
    assert [percent_text(x) for x in (None, 0.0, 0.01234, 0.5, 1.0)] == [
        "-", "0 %", "1.23 %", "50 %", "100 %"]
    assert [seconds_text(s) for s in (0.04, 59.9, 75.2, 3725)] == [
        "0.0 s", "59.9 s", "1 min 15 s", "1 h 2 min"]


def test_the_manifest_keeps_what_the_command_line_asked_for(compressed):
    config = read_manifest(compressed[0]).config
    assert config["bits_per_weight"] == 3.0 and config["bit_widths"] == [8, 4, 3, 2]
