"""generate: a base and fine-tunes of it side by side in one batch write what each would alone."""

import shutil

import pytest
import torch
from tiny_models import compressed_pair
from tiny_models import one_thread as one_thread

from adamix.errors import AdamixError, BankError, DeltaFileError
from adamix.generation import generate

OPTIONS = {"max_new_tokens": 6}


def texts(base, deltas, prompts, **options):
    return [(one.finetune, one.prompt, one.text)
            for one in generate(base, deltas, prompts, **OPTIONS | options)]


def test_side_by_side_is_what_each_writes_alone():
    pair = compressed_pair()
    [(_, _, base)] = texts(pair.base, {}, ["ab"])
    [(_, _, tuned)] = texts(pair.base, {"x": pair.delta}, ["ab"])
    assert base != tuned
    both = texts(pair.base, {"x": pair.delta, "y": pair.delta}, ["ab"], with_base=True)
    assert both == [(None, "ab", base), ("x", "ab", tuned), ("y", "ab", tuned)]


def test_a_prompt_a_model():
    pair = compressed_pair()
    got = texts(pair.base, {"x": pair.delta}, ["ab", "cde"], with_base=True)
    alone = texts(pair.base, {}, ["ab"]) + texts(pair.base, {"x": pair.delta}, ["cde"])
    assert got == alone


def test_one_model_takes_any_number_of_prompts():
    pair = compressed_pair()
    prompts, deltas = ["ab", "c", "def"], {"x": pair.delta}
    alone = [texts(pair.base, deltas, [prompt])[0] for prompt in prompts]
    assert texts(pair.base, deltas, prompts) == alone


def test_other_numbers_of_prompts_are_refused():
    pair = compressed_pair()
    with pytest.raises(AdamixError, match="2 models take 1 prompt or 2, got 3"):
        generate(pair.base, {"x": pair.delta, "y": pair.delta}, ["a", "b", "c"])


def test_a_grown_vocabulary_answers_alone_but_cannot_be_routed():
    pair = compressed_pair("grown")
    assert len(generate(pair.base, {"x": pair.delta}, ["ab"], **OPTIONS)) == 1
    with pytest.raises(BankError, match="x has 5 rows of .* that the base lacks"):
        generate(pair.base, {"x": pair.delta}, ["ab"], with_base=True, **OPTIONS)


def test_every_models_end_tokens_end_an_answer(tmp_path):
    """The deltas' generation configs count too: here every token ends the answer."""
    pair, folder = compressed_pair(), tmp_path / "delta"
    shutil.copytree(pair.delta, folder)
    (folder / "generation_config.json").write_text(
        f'{{"eos_token_id": {list(range(4, 128))}, "pad_token_id": 0}}')
    long = generate(pair.base, {"x": pair.delta, "y": pair.delta}, ["ab"], **OPTIONS)
    short = generate(pair.base, {"x": folder, "y": pair.delta}, ["ab"], **OPTIONS)
    assert all(a.text.startswith(b.text) and len(a.text) > len(b.text)
               for a, b in zip(long, short, strict=True))
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(DeltaFileError, match="generation_config.json cannot be read"):
        generate(pair.base, {"x": folder, "y": pair.delta}, ["ab"], **OPTIONS)


def test_sixteen_bits():
    pair = compressed_pair()
    got = generate(pair.base, {"x": pair.delta}, ["ab"], with_base=True, dtype=torch.bfloat16,
                   **OPTIONS)
    assert [one.finetune for one in got] == [None, "x"]
