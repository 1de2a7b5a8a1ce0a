"""Who writes the calibration text: the fine-tune, its base, or both."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import compressed_pair, make_pair
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM

from adamix import Config, compress, estimate
from adamix.calibration.sampling import sample
from adamix.errors import CalibrationError, CheckpointError
from adamix.storage.file import DELTA_FILE
from adamix.storage.log import TOKENS_FILE
from adamix.tokens import document_length, settled, writers

pytestmark = pytest.mark.usefixtures("without_gpu")

SHAPE = {"calibration_sequences": 6, "calibration_length": 24}
BOS, EOS = 1, 2


@pytest.fixture
def pair():
    return compressed_pair()


def written(base, finetuned, out, **choices):
    """The token ids that calibrated."""
    compress(base, finetuned, out, Config(ratio=3, **SHAPE | choices), threads=1)
    return load_file(out / TOKENS_FILE)["input_ids"].long()


def drawn(folder, sequences, first=0, most=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with ThreadPoolExecutor(1) as executor:
        return sample(model, BOS, EOS, sequences=sequences, length=24, seed=0, first=first,
                      most=most, executor=executor)


@pytest.mark.parametrize(("sample_from", "count", "parts"), [
    ("auto", 128, (0, 128)), ("finetuned", 128, (0, 128)), ("both", 128, (64, 64)),
    ("both", 5, (2, 3)), ("both", 1, (0, 1)), ("base", 7, (7, 0))])
def test_how_many_sequences_each_writes(sample_from, count, parts):
    assert writers(Config(sample_from=sample_from, calibration_sequences=count)) == parts


def recorded(out):
    """Who wrote, by `delta_config.json`, and who was asked to."""
    record = json.loads((out / "delta_config.json").read_text())
    return record["calibration"]["source"], record["config"].get("sample_from")


def ending(folder, out):
    """A copy of a model that ends all but every text where it begins."""
    shutil.copytree(folder, out)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        begun = model.model(input_ids=torch.tensor([[BOS, EOS, BOS, EOS, BOS]]))
        head = torch.zeros_like(model.lm_head.weight)
        for last in begun.last_hidden_state[0, ::2]:
            head[EOS] += 10 * last / last.norm()
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"] = head.to(tensors["lm_head.weight"].dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_the_fine_tune_writes_all_unless_it_is_asked_otherwise(pair, tmp_path):
    tokens = written(pair.base, pair.finetuned, tmp_path / "delta")
    assert torch.equal(tokens, drawn(pair.finetuned, 6))
    assert recorded(tmp_path / "delta") == ("self", None)  # as in files before there was a choice
    assert torch.equal(written(pair.base, pair.finetuned, tmp_path / "asked",
                               sample_from="finetuned"), tokens)
    assert recorded(tmp_path / "asked") == ("self", "finetuned")


def test_both_write_a_half_each(pair, tmp_path):
    tokens = written(pair.base, pair.finetuned, tmp_path / "delta", sample_from="both")
    assert torch.equal(tokens[:3], drawn(pair.finetuned, 3))
    assert torch.equal(tokens[3:], drawn(pair.base, 3, first=3))
    assert recorded(tmp_path / "delta") == ("both", "both")


def test_the_base_writes_half_where_the_fine_tune_writes_hardly_any(pair, tmp_path):
    short = ending(pair.finetuned, tmp_path / "finetuned")
    summary = compress(pair.base, short, tmp_path / "delta", Config(ratio=3, **SHAPE), threads=1)
    tokens = load_file(tmp_path / "delta" / TOKENS_FILE)["input_ids"].long()
    assert torch.equal(tokens[3:], drawn(pair.base, 3, first=3))
    assert torch.equal(tokens[:3], drawn(short, 6)[:3])
    assert summary.sample_from == "both" and 2 <= summary.document_length < 4
    assert recorded(tmp_path / "delta") == ("both", None)
    asked = compress(pair.base, short, tmp_path / "asked",
                     Config(ratio=3, sample_from="finetuned", **SHAPE), threads=1)
    assert asked.sample_from == "finetuned" and 2 <= asked.document_length < 4
    assert torch.equal(load_file(tmp_path / "asked" / TOKENS_FILE)["input_ids"].long(),
                       drawn(short, 6))


def test_an_interrupted_run_knows_who_wrote(pair, tmp_path, monkeypatch):
    import adamix.pipeline as pipeline

    short, out = ending(pair.finetuned, tmp_path / "finetuned"), tmp_path / "delta"
    compress(pair.base, short, tmp_path / "whole", Config(ratio=3, **SHAPE), threads=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(pair.base, short, out, Config(ratio=3, **SHAPE), threads=1)
    monkeypatch.undo()
    summary = compress(pair.base, short, out, Config(ratio=3, **SHAPE), threads=1)
    assert summary.resumed and summary.sample_from == "both"
    assert recorded(out) == ("both", None)
    assert (out / DELTA_FILE).read_bytes() == (tmp_path / "whole" / DELTA_FILE).read_bytes()


@pytest.mark.parametrize(("ends", "length", "by"), [
    (3, 24, "both"), (2, 24, "finetuned"), (0, 24, "finetuned"),  # of 6, 8 and 24 tokens
    (1, 8, "finetuned"), (2, 8, "both"), (0, 4, "finetuned")])  # short is what halves no sequence
def test_what_auto_stands_for(ends, length, by):
    own = torch.full((3, length), 7)
    own[:, : 2 * ends + 1 : 2] = BOS
    tokens = torch.cat([own, torch.full((2, length), 9)])  # these are the base's, or so
    config = Config(calibration_sequences=5)
    assert settled(config, tokens) == replace(config, sample_from=by)
    for asked in ("finetuned", "both", "base"):
        given = replace(config, sample_from=asked)
        assert settled(given, tokens) == given


def test_sequences_of_auto_are_no_longer_than_the_base_reads_where_it_writes(pair, tmp_path):
    base, finetuned = tmp_path / "base", ending(pair.finetuned, tmp_path / "finetuned")
    shutil.copytree(pair.base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 9}))
    assert written(base, finetuned, tmp_path / "short").shape == (6, 9)
    assert written(base, pair.finetuned, tmp_path / "long").shape == (6, 24)


def test_the_base_writes_all(pair, tmp_path):
    tokens = written(pair.base, pair.finetuned, tmp_path / "delta", sample_from="base")
    assert torch.equal(tokens, drawn(pair.base, 6))
    assert recorded(tmp_path / "delta") == ("base", "base")
    assert not torch.equal(tokens, drawn(pair.finetuned, 6))


def test_streams_depend_on_the_first_sequence(pair):
    assert torch.equal(drawn(pair.base, 2, first=4), drawn(pair.base, 2, first=4))
    assert not torch.equal(drawn(pair.base, 2, first=4), drawn(pair.base, 2))


def test_a_base_draws_no_id_that_the_fine_tune_lacks(tmp_path):
    small, _ = make_pair(tmp_path / "small")
    large, finetuned = make_pair(tmp_path / "large", grown_rows=5)
    most = AutoModelForCausalLM.from_pretrained(large).get_input_embeddings().weight.shape[0]
    tokens = drawn(finetuned, 64, most=most)
    assert tokens.max() < most and drawn(finetuned, 64).max() >= most
    assert torch.equal(drawn(small, 8, most=10**6), drawn(small, 8))
    with pytest.raises(CalibrationError, match="token 1 .* vocabulary of 1"):
        drawn(small, 8, most=1)


def test_a_base_that_names_no_first_token_is_named(tmp_path):
    base, finetuned = make_pair(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink(missing_ok=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"bos_token_id": None,
                                                           "eos_token_id": None}))
    short = ending(finetuned, tmp_path / "short")
    for side, asked in ((finetuned, "both"), (short, "auto")):
        with pytest.raises(CalibrationError, match="base names no token that begins a text: give "
                                                   "--calibration FILE, or --sample-from finet"):
            written(base, side, tmp_path / "delta", sample_from=asked)
    assert written(base, finetuned, tmp_path / "delta").shape == (6, 24)  # it need not write


def test_a_base_without_a_config_cannot_write(tmp_path):
    base, finetuned = make_pair(tmp_path)
    (base / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config"):
        written(base, finetuned, tmp_path / "delta", sample_from="base")


def test_an_interrupted_run_of_another_writer_is_not_gone_on_with(pair, tmp_path, monkeypatch):
    import adamix.pipeline as pipeline

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(pair.base, pair.finetuned, tmp_path / "delta", sample_from="base")
    monkeypatch.undo()
    with pytest.raises(Exception, match="sample_from"):
        written(pair.base, pair.finetuned, tmp_path / "delta", sample_from="both")
    tokens = written(pair.base, pair.finetuned, tmp_path / "delta", sample_from="base")
    assert torch.equal(tokens, drawn(pair.base, 6))


def test_both_are_estimated_as_two_models(pair, monkeypatch):
    import adamix.estimation as estimation

    chunks = []
    work = estimation.sampling_work
    monkeypatch.setattr(estimation, "sampling_work", lambda weights, config, tokens, gpu: (
        chunks.append(tokens), work(weights, config, tokens, gpu=gpu))[1])
    for sample_from in ("finetuned", "both"):
        estimate(pair.base, pair.finetuned, Config(sample_from=sample_from, **SHAPE))
    assert chunks == [(6, 24), (3, 24), (3, 24)]


def test_short_texts_are_told_of(capsys):
    from adamix.pipeline import Summary
    from adamix.reports import show_summary, summary_json

    config = Config(sample_from="both", calibration_sequences=4)
    tokens = torch.tensor([[1, 2] * 6, [1, 5, 2] * 4, [1] * 12, [1] * 12])
    assert document_length(tokens, config) == 24 / 10
    assert document_length(tokens, Config(sample_from="base", calibration_sequences=4)) is None
    done = Summary("delta", [], 10, 160, {}, 0, {}, 0, document_length=2.4)
    assert summary_json(done)["document_length"] == 2.4
    assert summary_json(replace(done, sample_from="both"))["sample_from"] == "both"
    for length, told in ((2.4, True), (8.0, False), (None, False)):
        for by, then in (("finetuned", "--sample-from both"), ("both", "the base wrote half")):
            show_summary(replace(done, document_length=length, sample_from=by))
            said = " ".join(capsys.readouterr().out.split())
            assert ("2.4 tokens in the mean" in said) is (then in said) is told


def test_fields_that_files_have_stay_in_them_though_they_are_none():
    fields = Config().to_dict()
    assert fields["max_widths"] is None and fields["bits_per_weight"] is None
    assert not fields.keys() & {"vision", "sample_from", "gain"}
    younger = {"vision": False, "sample_from": "base", "gain": 1.25}
    assert Config(**younger).to_dict() == fields | younger


def test_an_unknown_writer_is_refused():
    with pytest.raises(ValueError, match="sample_from must be 'auto', 'finetuned', 'both' or 'b"):
        Config(sample_from="either")


def test_sequences_are_no_longer_than_either_model_reads(tmp_path):
    base, finetuned = make_pair(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 9}))
    assert written(base, finetuned, tmp_path / "both", sample_from="both").shape == (6, 9)
    assert written(base, finetuned, tmp_path / "one").shape == (6, 24)
