"""Bad input to `compress`: one sentence of the right kind, and the disk as it was before."""

import errno
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_pair
from tiny_models import one_thread as one_thread

import adamix
from adamix import pipeline
from adamix.config import Config
from adamix.errors import (
    AdamixError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    MismatchError,
    NonFiniteError,
    OutputError,
)
from adamix.storage import file as storage
from adamix.storage import log

pytestmark = pytest.mark.usefixtures("without_gpu")

CONFIG = Config(bits_per_weight=3.0, calibration_sequences=4, calibration_length=16)
TEXT = ["some text to calibrate with, long enough for a few windows of sixteen"]
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))[0].parent


@pytest.fixture
def pair(original, tmp_path):
    """Folders {"base": ..., "finetuned": ...} to break."""
    shutil.copytree(original, tmp_path / "pair")
    return {side: tmp_path / "pair" / side for side in ("base", "finetuned")}


def contents(folder):
    return {(str(path), path.is_dir() or (path.stat().st_size, path.stat().st_mtime_ns))
            for path in folder.rglob("*")}


def refused(error, words, pair, out, config=CONFIG, **options):
    """The message of the error, and nothing new beside it."""
    before = contents(out.parents[1])
    with pytest.raises(AdamixError) as caught:
        adamix.compress(pair["base"], pair["finetuned"], out, config, threads=1, **options)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert "\n" not in message and len(message) < 400 and message
    for word in words:
        assert word in message
    assert contents(out.parents[1]) == before
    return message


@pytest.fixture
def out(tmp_path):
    """An output in a folder that is there, beside a file that is not ours."""
    (tmp_path / "deltas").mkdir()
    (tmp_path / "deltas" / "other").write_text("other")
    return tmp_path / "deltas" / "out"


# --- edits of a checkpoint ---------------------------------------------------------------------


def tensors(change):
    def edit(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return edit


def put(name, value):
    return tensors(lambda found: found[name].flatten()[-1:].fill_(value))


def cut(name, rows, columns):
    return tensors(lambda found: found.update({name: found[name][:rows, :columns].clone()}))


def settings(**changes):
    def edit(folder):
        body = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**body, **changes}))
    return edit


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


def remove(file):
    return lambda folder: (folder / file).unlink()


def swap_ids(folder):
    body = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = body["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(body))


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


MISTRAL = settings(model_type="mistral", architectures=["MistralForCausalLM"])
BROKEN = {
    "architecture": ("finetuned", MISTRAL, MismatchError, ["llama", "mistral"]),
    "shape": ("finetuned", cut(UP, 96, 60), MismatchError, [UP, "[96, 64]", "[96, 60]"]),
    "fewer rows": ("finetuned", cut(UP, 90, 64), MismatchError, [UP, "[90, 64]"]),
    "vocabulary shrunk": ("finetuned", cut(EMBEDDING, 120, 64), MismatchError, ["[120, 64]"]),
    "vocabulary swapped": ("finetuned", swap_ids, MismatchError, ["vocabularies", "'a'"]),
    "NaN in the base": ("base", put(UP, torch.nan), NonFiniteError, [UP, "base"]),
    "Inf in the base": ("base", put(EMBEDDING, torch.inf), NonFiniteError, [EMBEDDING, "base"]),
    "NaN in the fine-tune": ("finetuned", put(NORM, torch.nan), NonFiniteError, [NORM]),
    "Inf in the fine-tune": ("finetuned", put(UP, -torch.inf), NonFiniteError, [UP, "fine-tune"]),
    "a linear left out": ("finetuned", tensors(lambda found: found.pop(UP)), MismatchError, [UP]),
    "truncated base": ("base", truncate, CheckpointError, ["base", "truncated"]),
    "truncated fine-tune": ("finetuned", truncate, CheckpointError, ["finetuned", "truncated"]),
    "pickle": ("base", pickle_only, CheckpointError, ["safetensors"]),
    "no config": ("finetuned", remove("config.json"), CheckpointError, ["finetuned"]),
    "no config of the base": ("base", remove("config.json"), CheckpointError, ["config.json"]),
    "config no JSON": ("finetuned", write("config.json", "{"), CheckpointError, []),
    "config a list": ("finetuned", write("config.json", "[]"), CheckpointError, []),
    "base's config a list": ("base", write("config.json", "[]"), CheckpointError, []),
    "unknown model": ("finetuned", settings(model_type="xyz"), CheckpointError, ["xyz"]),
    "other size": ("finetuned", settings(hidden_size=128), CheckpointError, ["finetuned"]),
    "config with text": ("finetuned", settings(hidden_size="big"), CheckpointError, []),
    "tokenizer no JSON": ("finetuned", write("tokenizer.json", "{"), MismatchError, []),
    "tokenizer empty": ("finetuned", write("tokenizer.json", '{"model": {"vocab": {}}}'),
                        CheckpointError, []),
}


@pytest.mark.parametrize("side, edit, error, words", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_checkpoint_is_refused(pair, out, side, edit, error, words):
    edit(pair[side])
    refused(error, words, pair, out)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_folder_that_is_not_there_is_named(pair, out, tmp_path, side):
    refused(CheckpointError, ["no folder"], {**pair, side: tmp_path / "nothing"}, out)


# --- activations, budget, calibration ----------------------------------------------------------


@pytest.mark.parametrize("name, value, calibration, words", [
    ("model.norm.weight", 3e38, None, ["logits"]), ("model.norm.weight", 3e38, TEXT, ["lm_head"]),
    (NORM, 1e30, None, ["model.layers.1.self_attn.q_proj"]),  # X is finite, X Xᵀ is not
    (NORM, 3e38, TEXT, ["model.layers.1.self_attn.q_proj"])])
def test_activations_that_overflow_are_named(pair, out, name, value, calibration, words):
    tensors(lambda found: found[name].fill_(value))(pair["finetuned"])
    refused(NonFiniteError, words, pair, out, calibration=calibration)


@pytest.mark.parametrize("options", [
    dict(ratio=500), dict(ratio=20, bit_widths=(8,)), dict(bits_per_weight=0.05),
    dict(ratio=8, embeddings=False)], ids=str)
def test_a_budget_that_is_too_small_says_so(pair, out, options):
    config = Config(**options, calibration_sequences=4, calibration_length=16)
    message = refused(BudgetError, [], pair, out, config)
    assert "smaller ratio" in message


def test_a_budget_error_of_a_model_that_equals_its_base_is_a_sentence(pair, out):
    same = {"base": pair["base"], "finetuned": pair["base"]}
    refused(BudgetError, [], same, out, Config(ratio=16))


@pytest.mark.parametrize("text, words", [
    (None, ["nothing.jsonl", "no file"]), ("", ["no text"]), ("\n \n", ["no text"]),
    ('{"text": "x"}\n{"text"', ["line 2"]), ('{"messages": [{"role": "user"}]}', ["line 1"])])
def test_calibration_text_that_is_none_is_refused(pair, out, tmp_path, monkeypatch, text, words):
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / "nothing.jsonl"
    if text is not None:
        path.write_text(text)
    refused(CalibrationError, words, pair, out, calibration=path)


def test_text_without_a_tokenizer_is_refused_and_self_calibration_needs_none(pair, out):
    for folder in pair.values():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    refused(CalibrationError, ["tokenizer"], pair, out, calibration=TEXT)
    adamix.compress(pair["base"], pair["finetuned"], out, CONFIG, threads=1)
    assert out.exists()


# --- output ------------------------------------------------------------------------------------


def nothing_is_read(*arguments, **options):
    raise AssertionError("work had begun")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_exists_is_refused_before_any_work(pair, out, monkeypatch, kind):
    out.mkdir() if kind == "folder" else out.write_text("mine")
    monkeypatch.setattr(pipeline, "survey", nothing_is_read)
    refused(OutputError, ["out exists"], pair, out)


def test_an_output_below_a_file_is_refused_before_any_work(pair, out, monkeypatch):
    monkeypatch.setattr(pipeline, "survey", nothing_is_read)
    refused(OutputError, ["other"], pair, out.parent / "other" / "out")


@pytest.mark.parametrize("where, name", [(storage, "save_tensors"), (log, "save_tensors"),
                                         (pipeline, "write_log"), (pipeline.shutil, "copyfile")],
                         ids=["delta", "spectra", "log", "copies"])
def test_a_full_disk_at_any_file_leaves_the_finished_work_alone(
        pair, out, monkeypatch, where, name):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        with pytest.raises(OutputError, match="full"):
            adamix.compress(pair["base"], pair["finetuned"], out, CONFIG, threads=1)
    assert {path.name for path in out.parent.iterdir()} == {"other", ".out.partial"}
    adamix.compress(pair["base"], pair["finetuned"], out, CONFIG, threads=1)
    assert {path.name for path in out.parent.iterdir()} == {"other", "out"}


def test_folders_made_for_an_output_that_failed_are_gone_again(pair, out):
    put(UP, torch.nan)(pair["finetuned"])
    refused(NonFiniteError, [UP], pair, out.parent / "new" / "out")
