"""What becomes of each tensor, row by row of the table; and which pairs are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import one_thread as one_thread

from adamix.errors import MismatchError, NonFiniteError
from adamix.source.architecture import Architecture
from adamix.source.checkpoints import Checkpoint
from adamix.source.targets import Treatment, check_pair, read_pair, survey

EMBEDDING, HEAD, LINEAR = "embed.weight", "lm_head.weight", "layers.0.up.weight"
UNTIED = Architecture(frozenset({LINEAR, HEAD}), EMBEDDING, HEAD, False, 96, 64)
TIED = Architecture(frozenset({LINEAR, HEAD}), EMBEDDING, HEAD, True, 96, 64)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def common(seed):
    """The weights that a model of UNTIED must have, of one side."""
    return {LINEAR: numbers(64, 48, seed=seed), HEAD: numbers(100, 48, seed=seed + 1),
            EMBEDDING: numbers(100, 48, seed=seed + 2)}


def checkpoint(folder, tensors, vocabulary=None, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
    (folder / "config.json").write_text(json.dumps(config))
    if vocabulary is not None:
        body = vocabulary if isinstance(vocabulary, dict) else {"model": {"vocab": vocabulary}}
        (folder / "tokenizer.json").write_text(json.dumps(body))
    return Checkpoint(folder)


@pytest.fixture
def decide(tmp_path):
    """(base's tensor, fine-tune's tensor) -> its target; the common weights beside it are equal."""

    def call(name, old, new, architecture=UNTIED, **options):
        sides = [{**common(0), name: tensor} for tensor in (old, new)]
        for tensors, tensor in zip(sides, (old, new), strict=True):
            if tensor is None:
                del tensors[name]
        sources = checkpoint(tmp_path / "b", sides[0]), checkpoint(tmp_path / "f", sides[1])
        found = survey(*sources, architecture, **options)
        assert [t.name for t in found.targets] == sorted(sides[1])
        for target in found.targets:
            if target.name not in (name, HEAD if architecture.tied else None):
                assert target.treatment is Treatment.EQUAL
        assert found.absent == ([name] if new is None else [])
        return {t.name: t for t in found.targets}.get(name), sources

    return call


A, B = numbers(64, 48, seed=1), numbers(64, 48, seed=2)
NORM = torch.ones(48)
ROWS = [
    ("equal", LINEAR, A, A, Treatment.EQUAL),
    ("one bit", LINEAR, A, A.index_put((torch.tensor(3), torch.tensor(5)), A[3, 5] * 1.0000002),
     Treatment.LINEAR),
    ("linear", LINEAR, A, B, Treatment.LINEAR),
    ("head", HEAD, numbers(100, 48), numbers(100, 48, seed=9), Treatment.LINEAR),
    ("embedding", EMBEDDING, numbers(100, 48), numbers(100, 48, seed=9), Treatment.EMBEDDING),
    ("norm", "norm.weight", NORM, 1.01 * NORM, Treatment.WHOLE),
    ("bias", "layers.0.up.bias", NORM, 0 * NORM, Treatment.WHOLE),
    ("matrix of no linear", "router.table", A, B, Treatment.WHOLE),
    ("three dimensions", "conv.weight", A.view(64, 6, 8), B.view(64, 6, 8), Treatment.WHOLE),
    ("scalar", "scale", torch.tensor(1.0), torch.tensor(2.0), Treatment.WHOLE),
    ("int buffer", "ids", torch.arange(4), torch.arange(1, 5), Treatment.WHOLE),
    ("int matrix", LINEAR, (A * 9).to(torch.int8), (B * 9).to(torch.int8), Treatment.WHOLE),
    ("equal int buffer", "ids", torch.arange(4), torch.arange(4), Treatment.EQUAL),
    ("31 rows", LINEAR, A[:31].clone(), B[:31].clone(), Treatment.WHOLE),
    ("31 columns", LINEAR, A[:, :31].clone(), B[:, :31].clone(), Treatment.WHOLE),
    ("32 x 32", LINEAR, A[:32, :32].clone(), B[:32, :32].clone(), Treatment.LINEAR),
    ("wider type, same numbers", LINEAR, A.bfloat16(), A.bfloat16().float(), Treatment.EQUAL),
    ("narrower type", LINEAR, A, A.bfloat16(), Treatment.LINEAR),
    ("only in the fine-tune", "layers.0.new.weight", None, A, Treatment.WHOLE),
]


@pytest.mark.parametrize("name, old, new, treatment", [row[1:] for row in ROWS],
                         ids=[row[0] for row in ROWS])
def test_each_row_of_the_table(decide, name, old, new, treatment):
    target, _ = decide(name, old, new)
    assert target.treatment is treatment
    assert (target.shape, target.dtype, target.extra_rows) == (tuple(new.shape), new.dtype, 0)


@pytest.mark.parametrize("architecture", [UNTIED, TIED])
def test_a_tied_head_is_the_embedding_whatever_the_file_holds(decide, architecture):
    target, _ = decide(HEAD, numbers(100, 48), numbers(100, 48, seed=9), architecture)
    assert target.treatment is (Treatment.TIED if architecture.tied else Treatment.LINEAR)


def test_a_tensor_of_the_base_alone_is_absent(decide):
    assert decide("layers.0.old.weight", A, None)[0] is None


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_embeddings_off_keeps_the_vocabularys_matrices_whole(decide, name):
    old, new = numbers(100, 48), numbers(105, 48, seed=9)
    target, _ = decide(name, old, new, compress_embeddings=False)
    assert (target.treatment, target.shape, target.extra_rows) == (Treatment.WHOLE, (105, 48), 0)


def test_embeddings_off_compresses_the_other_matrices(decide):
    assert decide(LINEAR, A, B, compress_embeddings=False)[0].treatment is Treatment.LINEAR


@pytest.mark.parametrize("name, treatment", [(EMBEDDING, Treatment.EMBEDDING),
                                             (HEAD, Treatment.LINEAR)])
@pytest.mark.parametrize("changed", [True, False])
def test_a_grown_vocabulary_is_its_shared_rows_and_its_extra_ones(decide, name, treatment, changed):
    old, extra = numbers(100, 48), numbers(5, 48, seed=3)
    new = torch.cat([old + changed * 0.1, extra])
    target, sources = decide(name, old, new)
    assert target.treatment is (treatment if changed else Treatment.EQUAL)
    assert (target.shape, target.extra_rows) == ((100, 48), 5)
    pair = read_pair(*sources, target)
    assert torch.equal(pair.base, old) and torch.equal(pair.finetuned, new[:100])
    assert torch.equal(pair.delta, new[:100] - old)


def test_the_delta_of_16_bit_weights_is_exact_in_fp32(decide):
    old, new = A.bfloat16(), (A + 1e-3 * B).bfloat16()
    pair = read_pair(*(found := decide(LINEAR, old, new))[1], found[0])
    assert pair.delta.dtype == torch.float32
    assert torch.equal(pair.delta.double(), new.double() - old.double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [LINEAR, "norm.weight", EMBEDDING])
@pytest.mark.parametrize("side", ["base", "fine-tune"])
def test_a_weight_that_is_not_finite_is_named_with_its_side(tmp_path, side, name, value):
    sides = {s: {**common(0), "norm.weight": NORM.clone()} for s in ("base", "fine-tune")}
    sides[side][name] = sides[side][name].bfloat16()
    sides[side][name].flatten()[-1] = value
    sources = [checkpoint(tmp_path / s, tensors) for s, tensors in sides.items()]
    with pytest.raises(NonFiniteError, match=f"{name} of the {side}"):
        survey(*sources, UNTIED)


def test_a_row_beyond_the_base_that_is_not_finite_is_named(tmp_path):
    grown = torch.cat([common(0)[EMBEDDING], torch.full((1, 48), torch.nan)])
    sources = (checkpoint(tmp_path / "b", common(0)),
               checkpoint(tmp_path / "f", {**common(0), EMBEDDING: grown}))
    with pytest.raises(NonFiniteError, match=f"{EMBEDDING} of the fine-tune"):
        survey(*sources, UNTIED)


# --- pairs -------------------------------------------------------------------------------------

WORDS = {"a": 0, "b": 1, "c": 2}


def wrong_shape(name, *shape):
    return dict(change={name: numbers(*shape)})


REFUSED = {
    "model_type": (dict(config={"model_type": "gpt2"}), ["model_type", "llama", "gpt2"]),
    "class": (dict(config={"architectures": ["Other"]}), ["architectures", "Other"]),
    "shape": (wrong_shape(LINEAR, 64, 49), [LINEAR, "[64, 48]", "[64, 49]"]),
    "more rows": (wrong_shape(LINEAR, 65, 48), [LINEAR, "[65, 48]"]),
    "dimensions": (wrong_shape(LINEAR, 64, 24, 2), [LINEAR, "[64, 24, 2]"]),
    "fewer words": (wrong_shape(EMBEDDING, 99, 48), [EMBEDDING, "[99, 48]", "only grow"]),
    "wider words": (wrong_shape(EMBEDDING, 105, 50), [EMBEDDING, "[105, 50]"]),
    "int for float": (dict(change={LINEAR: torch.ones(64, 48, dtype=torch.int8)}),
                      [LINEAR, "torch.float32", "torch.int8"]),
    "lacks a linear": (dict(drop=[LINEAR]), [LINEAR, "lacks"]),
    "other names": (dict(drop=list(common(0)), change={"x": A}), ["no tensor"]),
    "swapped ids": (dict(words={"a": 0, "b": 2, "c": 1}), ["vocabular", "'b'", "1", "2"]),
    "other tokens": (dict(words={"x": 0, "y": 1}), ["vocabular"]),
    "no tokenizer file": (dict(words={"version": 1}), ["tokenizer.json"]),
}


@pytest.mark.parametrize("options, words", REFUSED.values(), ids=list(REFUSED))
def test_two_checkpoints_that_are_no_pair_are_refused(tmp_path, options, words):
    finetuned = {**common(5), **options.get("change", {})}
    for name in options.get("drop", []):
        del finetuned[name]
    base = checkpoint(tmp_path / "b", common(0), {"model": {"vocab": WORDS}})
    vocabulary = options.get("words", WORDS)
    body = vocabulary if "version" in vocabulary else {"model": {"vocab": vocabulary}}
    other = checkpoint(tmp_path / "f", finetuned, body, **options.get("config", {}))
    with pytest.raises(MismatchError) as caught:
        check_pair(base, other, UNTIED)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


def test_a_special_token_with_another_id_is_refused(tmp_path):
    sides = []
    for folder, numbered in (("b", (3, 4)), ("f", (4, 3))):
        added = [{"id": i, "content": token} for i, token in zip(numbered, "xy", strict=True)]
        body = {"added_tokens": added, "model": {"vocab": WORDS}}
        sides.append(checkpoint(tmp_path / folder, common(0), body))
    with pytest.raises(MismatchError, match="vocabular"):
        check_pair(*sides, UNTIED)


@pytest.mark.parametrize("architecture", [UNTIED, TIED])
def test_a_pair_is_accepted_with_more_words_on_either_tensor_and_a_tied_head_left_out(
        tmp_path, architecture):
    finetuned = {**common(5), EMBEDDING: numbers(105, 48), HEAD: numbers(105, 48)}
    if architecture.tied:
        del finetuned[HEAD]
    base = checkpoint(tmp_path / "b", common(0), {"model": {"vocab": WORDS}})
    other = checkpoint(tmp_path / "f", finetuned, {"model": {"vocab": {**WORDS, "d": 3}}})
    check_pair(base, other, architecture)
