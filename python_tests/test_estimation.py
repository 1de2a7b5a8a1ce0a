"""estimate: sizes that compress then writes, bounds on its memory, and counts of its operations."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, checkpoint_tensors, compressed_pair, make_pair
from tiny_models import one_thread as one_thread
from typer.testing import CliRunner

import adamix
from adamix import estimation, pipeline
from adamix.__main__ import app
from adamix.config import Config
from adamix.costs import Work
from adamix.devices import CPU
from adamix.errors import BudgetError, CalibrationError, MemoryLimitError, MismatchError
from adamix.estimation import Estimate, estimate
from adamix.pipeline import compress
from adamix.source.checkpoints import Checkpoint
from adamix.storage.file import delta_bytes

pytestmark = pytest.mark.usefixtures("without_gpu")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
QUICK = dict(calibration_sequences=4, calibration_length=16)
TEXT = [f"document {i} says {i * i}" for i in range(30)]
CONFIG = Config(bits_per_weight=3.0, bit_widths=(8, 4, 3, 2), calibration_sequences=8,
                calibration_length=32)  # what compressed_pair() does
STEADY = Work(*[1e-9] * 10)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Also where a GPU is."""
    for module in (estimation, pipeline):
        monkeypatch.setattr(module, "find_compute", lambda *arguments: CPU)


@pytest.fixture
def steady(monkeypatch):
    """Rates that are not measured."""
    monkeypatch.setattr(estimation, "measure", lambda *arguments: STEADY)


def test_token_ids_count_as_many_as_they_are(steady):
    pair = compressed_pair()
    few, many = (estimate(pair.base, pair.finetuned, CONFIG, threads=1, calibration=torch.zeros(
        sequences, 16, dtype=torch.long)).seconds for sequences in (1, 1000))
    assert sum(many.values()) > 2 * sum(few.values())


# --- size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_size_is_what_compress_writes_within_1_percent(steady, variant):
    pair = compressed_pair(variant)
    found = estimate(pair.base, pair.finetuned, CONFIG, threads=1)
    assert found.bytes == pytest.approx(delta_bytes(pair.delta), rel=0.01)
    assert found.matrices == len(adamix.load(pair.delta).matrices)


@pytest.mark.parametrize("config", [
    Config(ratio=4, **QUICK), Config(ratio=8, **QUICK), Config(ratio=16, **QUICK),
    Config(ratio=3, embeddings=False, **QUICK), Config.preset("paper", ratio=8, **QUICK)])
def test_a_ratio_is_estimated_within_1_percent(steady, tmp_path, config, monkeypatch):
    make_pair(tmp_path, grown_rows=5)
    monkeypatch.chdir(tmp_path)
    base, finetuned = "base", "finetuned"  # of what these names leave, few components are made
    found = estimate(base, finetuned, config, calibration=TEXT, threads=1)
    done = compress(base, finetuned, tmp_path / "d", config, calibration=TEXT, threads=1)
    assert found.bytes == pytest.approx(done.bytes, rel=0.01)
    assert (found.bytes_16bit, found.whole) == (done.bytes_16bit, done.whole)
    assert found.ratio == pytest.approx(done.ratio, rel=0.01)


def test_one_budget_for_all_matrices_is_estimated_with_its_second_stage(steady, tmp_path):
    pair, config = compressed_pair(), Config(ratio=4, allocate="model", **QUICK)
    done = compress(pair.base, pair.finetuned, tmp_path / "d", config, calibration=TEXT, threads=1)
    found = estimate(pair.base, pair.finetuned, config, calibration=TEXT, threads=1)
    assert found.bytes == pytest.approx(done.bytes, rel=0.01)
    assert set(found.seconds) == set(done.seconds) > {"sharing the budget out"}


def test_the_shipped_pair_is_estimated_within_1_permille(steady, tmp_path):
    pair = EXAMPLES / "base", EXAMPLES / "finetuned"
    config = Config(ratio=16, **QUICK)
    done = compress(*pair, tmp_path / "d", config)
    assert estimate(*pair, config).bytes == pytest.approx(done.bytes, rel=0.001)


def test_it_is_an_upper_bound_where_a_part_is_as_in_the_base(steady, tmp_path):
    base, finetuned = make_pair(tmp_path)
    old, new = checkpoint_tensors(base), load_file(finetuned / "model.safetensors")
    save_file({name: old[name] if "layers.0" in name else new[name] for name in new},
              finetuned / "model.safetensors", metadata={"format": "pt"})
    config = Config(ratio=8, **QUICK)
    done = compress(base, finetuned, tmp_path / "d", config, calibration=TEXT, threads=1)
    found = estimate(base, finetuned, config, calibration=TEXT, threads=1)
    assert found.bytes > 1.2 * done.bytes and found.bytes_16bit > 1.2 * done.bytes_16bit


def test_no_tensor_is_read(steady, monkeypatch):
    def read(*arguments):
        raise AssertionError("a tensor was read")

    pair = compressed_pair("sharded")
    monkeypatch.setattr(Checkpoint, "read", read)
    assert estimate(pair.base, pair.finetuned, CONFIG).bytes > 0


# --- memory ------------------------------------------------------------------------------------


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "adamix", *map(str, arguments), "--json"],
                          capture_output=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("calibration", [True, False])
def test_the_memory_is_a_bound_of_what_compress_takes(tmp_path, calibration):
    pair, text = compressed_pair(), tmp_path / "text.txt"
    text.write_text("\n".join(TEXT))
    options = ["--bits", "3", "--sequences", "64", "--length", "64", "--threads", "2",
               "--device", "cpu",
               *(["--calibration", text] if calibration else [])]
    done = run("compress", pair.base, pair.finetuned, "-o", tmp_path / "d", *options)
    found = run("estimate", pair.base, pair.finetuned, *options)
    assert done["peak_bytes"] <= found["peak_bytes"] <= 3 * done["peak_bytes"]
    assert found["gpu_bytes"] == 0 and found["threads"] == 2
    stages = set(found["memory"]) - {"read", "calibration and compression", "writing"}
    assert stages == (set() if calibration else {"calibration tokens"})
    assert set(found["seconds"]) == set(done["seconds"])


def test_a_bound_on_memory_is_kept_to_or_refused(steady, monkeypatch):
    pair = compressed_pair()
    free = estimate(pair.base, pair.finetuned, CONFIG, calibration=TEXT, threads=2)
    limit = free.peak_bytes - 10**6
    bound = estimate(pair.base, pair.finetuned, CONFIG, calibration=TEXT, threads=2,
                     max_memory=limit)
    assert bound.peak_bytes == limit
    with pytest.raises(MemoryLimitError, match="reading the largest tensor") as caught:
        estimate(pair.base, pair.finetuned, CONFIG, max_memory=1000)
    assert "\n" not in str(caught.value)
    limit = free.memory["read"] + 10**7
    with pytest.raises(MemoryLimitError, match="one matrix at a time takes"):
        estimate(pair.base, pair.finetuned, CONFIG, calibration=TEXT, max_memory=limit)
    with pytest.raises(CalibrationError, match="give --calibration FILE"):
        estimate(pair.base, pair.finetuned, CONFIG, max_memory=limit)


# --- what compress would refuse ----------------------------------------------------------------


def test_what_cannot_be_compressed_is_refused_in_a_sentence(steady, tmp_path):
    pair = compressed_pair()
    with pytest.raises(BudgetError, match="choose a smaller ratio"):
        estimate(pair.base, pair.finetuned, Config(ratio=500))
    other = make_pair(tmp_path / "other", grown_rows=5)[1]
    with pytest.raises(MismatchError, match="a vocabulary may only grow"):
        estimate(other, pair.finetuned, CONFIG)
    result = CliRunner().invoke(app, ["estimate", str(tmp_path / "none"), str(pair.finetuned)])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "none is no folder" in result.stderr


# --- time --------------------------------------------------------------------------------------


def test_seconds_are_those_of_the_work_at_the_rates_on_so_many_threads(monkeypatch):
    pair, rates = compressed_pair(), [STEADY]
    monkeypatch.setattr(estimation, "measure", lambda *arguments: rates[0])

    def seconds(threads=1, **options):
        return estimate(pair.base, pair.finetuned, Config(**QUICK | options), threads=threads
                        ).seconds

    once, both = seconds(), "calibration and compression"
    rates[0] = Work(*[2e-9] * 10)
    assert {stage: 2 * spent for stage, spent in once.items()} == pytest.approx(seconds())
    rates[0] = STEADY
    assert seconds(threads=2)[both] == pytest.approx(once[both] / 2)
    assert seconds(passes=6)[both] > once[both] < seconds(calibration_sequences=400)[both]
    assert seconds(calibration_length=32)["calibration tokens"] > once["calibration tokens"]


def test_every_rate_is_measured(monkeypatch):
    rates, measure = [], estimation.measure
    monkeypatch.setattr(estimation, "measure",
                        lambda *arguments: (rates.append(measure(*arguments)), rates[0])[1])
    pair = compressed_pair()
    found = estimate(pair.base, pair.finetuned, Config(**QUICK), threads=2)
    assert all(0 <= rate < 1 for rate in vars(rates[0]).values())
    assert all(rate > 0 for name, rate in vars(rates[0]).items() if name != "activations")
    assert math.isfinite(found.total_seconds) and found.total_seconds == sum(found.seconds.values())


# --- the command -------------------------------------------------------------------------------


def test_the_command_prints_for_people_and_for_programs(monkeypatch):
    seen = {}

    def stub(base, finetuned, config, **rest):
        seen.update(config=config, **rest)
        return Estimate(9_543, 152_690, {"wte": 2048}, 16, {"read": 61.0, "other": 2.0},
                        {"read": 2**20, "other": 2**30}, 0, 2)

    monkeypatch.setattr(estimation, "estimate", stub)
    options = ["estimate", "a", "b", "--ratio", "8", "--preset", "paper", "--sequences", "3",
               "--length", "5", "--threads", "2", "--passes", "3", "--widths", "8,2",
               "--calibration", "t.txt", "--no-embeddings", "--max-memory", "1.5",
               "--device", "cpu"]
    printed = CliRunner().invoke(app, options).stdout
    assert "9.32 KiB, everything counted: 1/16.00 of the 149.1 KiB" in printed
    assert "1 min 3 s on 2 threads" in printed and "read 1 min 1 s" in printed
    assert "1.00 GiB at most, in the stage: other" in printed and "2.00 KiB" in printed
    assert "none: compress works on the CPU" in printed
    assert seen == {"config": Config.preset(
        "paper", ratio=8.0, passes=3, bit_widths=(8, 2), embeddings=False, calibration_sequences=3,
        calibration_length=5), "calibration": "t.txt", "threads": 2, "device": "cpu",
                    "max_memory": 1_500_000_000}
    body = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert (body["bytes"], body["peak_bytes"], body["total_seconds"]) == (9_543, 2**30, 63.0)


def test_it_is_part_of_the_library():
    assert adamix.estimate is estimate and adamix.Estimate is Estimate
