"""A ratio is of bytes on disk with everything counted; what cannot be reached is said at once."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, checkpoint_tensors, compressed_pair, make_pair
from tiny_models import one_thread as one_thread

from adamix import matrices, pipeline, tokens
from adamix.config import Config
from adamix.errors import BudgetError
from adamix.pipeline import compress
from adamix.storage.file import header_bytes, read_delta

QUICK = dict(calibration_sequences=4, calibration_length=16)
FILES = ("delta.safetensors", "delta_config.json")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {"plain": {}, "tied": {"tied": True}, "grown": {"grown_rows": 5}}
    return {name: make_pair(tmp_path_factory.mktemp(name), **options)
            for name, options in made.items()}


def differing_bytes(base, finetuned):
    """16-bit bytes of the tensors that differ, counted from the files."""
    old, new = checkpoint_tensors(base), checkpoint_tensors(finetuned)
    return sum(2 * tensor.numel() for name, tensor in new.items()
               if name not in old or not torch.equal(tensor, old[name]))


def on_disk(folder):
    return sum((folder / name).stat().st_size for name in FILES)


@pytest.mark.parametrize("variant, embeddings, ratio", [
    ("plain", True, 4), ("plain", True, 8), ("plain", True, 16), ("plain", False, 3),
    ("tied", True, 8), ("tied", True, 16), ("tied", False, 4),
    ("grown", True, 4), ("grown", True, 16), ("grown", False, 3)])
def test_a_ratio_is_kept_in_bytes_on_disk_and_used_up(pairs, tmp_path, variant, embeddings, ratio):
    base, finetuned = pairs[variant]
    summary = compress(base, finetuned, tmp_path / "d",
                       Config(ratio=ratio, embeddings=embeddings, **QUICK), threads=1)
    whole, size = differing_bytes(base, finetuned), on_disk(tmp_path / "d")
    assert (summary.bytes, summary.bytes_16bit) == (size, whole)
    assert summary.ratio == whole / size >= ratio
    assert not (tmp_path / "d" / "delta.safetensors.index.json").exists()
    # A plan goes in steps of 12 bytes or more: at 1/16 these are 2 % of each of the 16 matrices.
    assert size * ratio / whole >= (0.96 if ratio == 16 else 0.97)


def test_bytes_beside_the_delta_are_the_other_files(pairs, tmp_path):
    summary = compress(*pairs["plain"], tmp_path / "d", Config(ratio=8, **QUICK), threads=1)
    files = {path.name: path.stat().st_size for path in (tmp_path / "d").iterdir()}
    assert summary.bytes_beside == sum(files.values()) - sum(files[name] for name in FILES)
    assert {"compression_log.csv", "tokenizer.json", "config.json"} < files.keys()


def test_only_what_differs_counts(tmp_path):
    """With one matrix and one norm changed, 1/4 is of those two alone."""
    base, finetuned = make_pair(tmp_path, seed=3)
    old, new = (checkpoint_tensors(path) for path in (base, finetuned))
    kept = ("lm_head.weight", "model.norm.weight")
    save_file({**old, **{name: new[name] for name in kept}}, finetuned / "model.safetensors",
              metadata={"format": "pt"})
    summary = compress(base, finetuned, tmp_path / "d", Config(ratio=4, **QUICK), threads=1)
    assert summary.bytes_16bit == 2 * (128 * 64 + 64)
    assert on_disk(tmp_path / "d") <= summary.bytes_16bit / 4
    assert [row.name for row in summary.rows] == ["lm_head.weight"]


@pytest.mark.parametrize("bits", [1.0, 2.5, 4.0])
def test_bits_per_weight_hold_for_each_matrix_with_its_scales_and_counts(pairs, tmp_path, bits):
    config = Config(bits_per_weight=bits, **QUICK)
    compress(*pairs["plain"], tmp_path / "d", config, threads=1)
    for name, packed in read_delta(tmp_path / "d").matrices.items():
        out, n = packed.shape
        words = sum((v * -(-n // 32) + u * -(-out // 32)) * count
                    for (v, u), count in packed.widths.items())
        used = 32 * (words + packed.rank + 2 * 8)
        step = 32 * (-(-out // 32) + -(-n // 32) + 1)  # one bit more for one component
        assert used <= bits * out * n < used + 3 * step, name
        assert packed.bits_per_weight == used / (out * n)


# --- what cannot be reached --------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    (dict(ratio=1000), ["ratio 1000", "smaller ratio"]),
    (dict(ratio=20, bit_widths=(8,)), ["one component", "smaller ratio"]),
    (dict(ratio=8, embeddings=False), ["ratio 8", "whole"]),
    (dict(bits_per_weight=0.05), ["one component", "bits a weight"])])
def test_too_small_a_budget_is_refused_before_any_calibration(
        pairs, tmp_path, monkeypatch, options, words):
    def long_work(*arguments, **named):
        raise AssertionError("calibration had begun")

    for module, name in ((tokens, "sample"), (matrices, "accumulate"),
                         (matrices, "shared_inputs"), (matrices, "quantize_matrix")):
        monkeypatch.setattr(module, name, long_work)
    with pytest.raises(BudgetError) as caught:
        compress(*pairs["plain"], tmp_path / "d", Config(**options, **QUICK), threads=1)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


# --- the header --------------------------------------------------------------------------------


def real_header(path):
    with path.open("rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_headers_bound_holds_for_a_delta_and_is_near(variant):
    path = compressed_pair(variant).delta / "delta.safetensors"
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
    data = path.stat().st_size - real_header(path)
    bound = header_bytes(shapes, data)
    assert real_header(path) <= bound <= real_header(path) + 12 * len(shapes) + 8


@pytest.mark.parametrize("names", [
    ["a"], [f"model.layers.{i}.w" for i in range(300)], ["ä.ö.weight", "重み.*.w", 'quo"te\\'],
    [f"whole:{'x' * n}" for n in range(1, 9)]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.float64, torch.bool])
def test_the_headers_bound_holds_for_any_names_and_dtypes(tmp_path, names, dtype):
    tensors = {name: torch.zeros(i % 3, 5, dtype=dtype) for i, name in enumerate(names)}
    save_file(tensors, tmp_path / "t", metadata={"format": "adamix"})
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    data = sum(tensor.nbytes for tensor in tensors.values())
    assert real_header(tmp_path / "t") <= header_bytes(shapes, data)


def test_the_config_on_disk_is_what_was_counted(pairs, tmp_path, monkeypatch):
    """The budget is planned from a config file of the very length that is written."""
    counted = []
    planned = pipeline.plan_budget

    def spy(found, manifest, config):
        from adamix.storage.file import manifest_text
        counted.append(len(manifest_text(manifest).encode()))
        return planned(found, manifest, config)

    monkeypatch.setattr(pipeline, "plan_budget", spy)
    compress(*pairs["grown"], tmp_path / "d", Config(ratio=8, **QUICK), threads=1)
    written = (tmp_path / "d" / "delta_config.json").read_bytes()
    assert counted and counted[-1] >= len(written) >= counted[-1] - 64
    assert json.loads(written)["extra_rows"] == ["lm_head.weight", "model.embed_tokens.weight"]
