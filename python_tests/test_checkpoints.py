"""Checkpoints on disk: sharded or not, lazily, with a sentence a fault; and their fingerprint."""

import hashlib
import json
import weakref

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import HIDDEN, VOCABULARY, checkpoint_tensors, make_pair
from tiny_models import one_thread as one_thread

from adamix.errors import CheckpointError, FingerprintError
from adamix.source import checkpoints
from adamix.source.architecture import Architecture, describe
from adamix.source.checkpoints import Checkpoint, Fingerprint, check_fingerprint
from adamix.source.targets import survey

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{sharded: (base, finetuned)}, the same numbers in one file and in several."""
    return {sharded: make_pair(tmp_path_factory.mktemp("pair"), sharded=sharded)
            for sharded in (False, True)}


def write(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def write_sharded(folder):
    """Two shards of one tensor each."""
    folder.mkdir()
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name, file in weight_map.items():
        save_file({name: torch.arange(6.0)}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def fingerprint(tensors):
    found = Fingerprint()
    for name in sorted(tensors):
        found.add(name, tensors[name])
    return found.result()


def refused(call, *words):
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


# --- reading -----------------------------------------------------------------------------------


def test_a_sharded_checkpoint_reads_as_a_single_one(pairs):
    assert len(list(pairs[True][0].glob("*.safetensors"))) > 2
    for single, sharded in zip(pairs[False], pairs[True], strict=True):
        one, many, expected = Checkpoint(single), Checkpoint(sharded), checkpoint_tensors(single)
        assert one.names == many.names == sorted(expected)
        assert one.headers == many.headers == {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()}
        for name, tensor in expected.items():
            assert name in many and many.read(name).dtype == tensor.dtype
            assert torch.equal(one.read(name), tensor) and torch.equal(many.read(name), tensor)
    assert "model.layers.2.mlp.up_proj.weight" not in Checkpoint(pairs[True][0])


def test_headers_read_no_tensor_and_a_survey_holds_three_at_most(pairs, monkeypatch):
    alive, read, most = [], [], 0

    class Counting:
        def __init__(self, path, framework):
            self.inner = checkpoints_safe_open(path, framework=framework)

        def __enter__(self):
            self.reader = self.inner.__enter__()
            return self

        def __exit__(self, *rest):
            return self.inner.__exit__(*rest)

        def __getattr__(self, name):
            return getattr(self.reader, name)

        def get_tensor(self, name):
            nonlocal most
            tensor = self.reader.get_tensor(name)
            read.append(name)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

    checkpoints_safe_open = checkpoints.safe_open
    monkeypatch.setattr(checkpoints, "safe_open", Counting)
    sources = [Checkpoint(path) for path in pairs[True]]
    assert all(source.headers and source.config for source in sources) and not read
    survey(*sources, describe(pairs[True][1]))
    assert sorted(read) == sorted([*sources[0].names, *sources[1].names])  # each one once
    assert most <= 3 < len(sources[0].names)  # the pair in hand, and one of the pair before it


def test_describe_names_the_linears_the_embedding_and_the_head(pairs, tmp_path):
    tied = describe(make_pair(tmp_path, tied=True)[1])
    inner = [f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    expected = Architecture(frozenset([*inner, "lm_head.weight"]), "model.embed_tokens.weight",
                            "lm_head.weight", False, VOCABULARY, HIDDEN)
    assert describe(pairs[False][1]) == expected
    assert (tied.tied, tied.linears, tied.head) == (True, expected.linears, expected.head)


# --- faults ------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named(tmp_path):
    refused(lambda: Checkpoint(tmp_path / "nothing"), "nothing", "no folder")


def test_a_name_on_the_hub_that_does_not_exist_is_named(monkeypatch):
    import huggingface_hub

    def missing(*arguments, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    refused(lambda: Checkpoint("someone/nothing"), "someone/nothing", "no network")


def test_a_folder_with_pickles_alone_is_told_what_is_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    refused(lambda: Checkpoint(tmp_path), "only safetensors")


def test_no_config_and_a_config_that_is_no_json_are_named(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(lambda: Checkpoint(tmp_path).config, "no config.json")
    refused(lambda: describe(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    refused(lambda: Checkpoint(tmp_path).config, "config.json", "not JSON")
    refused(lambda: describe(tmp_path))


def test_a_config_of_no_known_model_is_refused(tmp_path):
    write(tmp_path, {"a": torch.ones(2)}, {"model_type": "no-such-model"})
    refused(lambda: describe(tmp_path), "no-such-model")


def test_a_missing_shard_is_named(tmp_path):
    folder = write_sharded(tmp_path / "c")
    (folder / "model-2.safetensors").unlink()
    refused(lambda: Checkpoint(folder).headers, "lacks its shard model-2.safetensors")
    refused(lambda: Checkpoint(folder).read("b"), "lacks its shard model-2.safetensors")


def test_an_index_that_names_a_tensor_no_shard_has_is_refused(tmp_path):
    folder = write_sharded(tmp_path / "c")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-1.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(lambda: Checkpoint(folder).headers, "ghost", "index")


@pytest.mark.parametrize("keep", [0, 5, 30, -4, -1])
def test_a_truncated_shard_is_named(tmp_path, keep):
    folder = write_sharded(tmp_path / "c")
    data = (folder / "model-2.safetensors").read_bytes()
    (folder / "model-2.safetensors").write_bytes(data[:keep])
    refused(lambda: Checkpoint(folder).headers, "model-2.safetensors", "truncated")


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_a_truncated_single_file_is_named(tmp_path, keep):
    folder = write(tmp_path / "c", {"a": torch.arange(6.0)})
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    refused(lambda: Checkpoint(folder), "model.safetensors", "truncated")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}',
                                  '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    folder = write_sharded(tmp_path / "c")
    (folder / INDEX).write_text(text)
    refused(lambda: Checkpoint(folder).headers, INDEX)


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    folder = write(tmp_path / "c", {"a": torch.ones(4).to(torch.float8_e4m3fn)})
    refused(lambda: Checkpoint(folder).headers, "F8_E4M3", "a is")


# --- fingerprint -------------------------------------------------------------------------------

SMALL = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, -2, 3]),
         "c": torch.tensor(1.5, dtype=torch.bfloat16), "d": torch.empty(0)}


def test_the_fingerprint_of_small_tensors_is_the_hash_of_labels_and_bytes():
    parts = [(b"a torch.float32 (2, 3)\n", SMALL["a"].numpy().astype("<f4").tobytes()),
             (b"b torch.int64 (3,)\n", SMALL["b"].numpy().astype("<i8").tobytes()),
             (b"c torch.bfloat16 ()\n", b"\xc0\x3f"),  # 1.5 is 0x3fc0
             (b"d torch.float32 (0,)\n", b"")]
    sampled = b"".join(label + data for label, data in parts)
    hashes = b"".join(label + hashlib.sha256(data).digest() for label, data in parts)
    assert fingerprint(SMALL) == {"sha256": hashlib.sha256(hashes).hexdigest(),
                                  "sampled": hashlib.sha256(sampled).hexdigest()}


def test_every_byte_name_dtype_and_shape_counts():
    def changed(name, tensor):
        return {**SMALL, name: tensor}

    flipped = []
    for byte in range(24):
        data = SMALL["a"].clone().view(torch.uint8).flatten()
        data[byte] ^= 1
        flipped.append(changed("a", data.view(torch.float32).view(2, 3)))
    others = [changed("a", SMALL["a"].view(3, 2)), changed("a", SMALL["a"].view(6)),
              changed("a", SMALL["a"].view(torch.int32)),
              {("z" if name == "a" else name): t for name, t in SMALL.items()},
              {name: t for name, t in SMALL.items() if name != "d"}]
    found = [fingerprint(tensors) for tensors in [SMALL, *flipped, *others]]
    for key in ("sha256", "sampled"):
        assert len({result[key] for result in found}) == len(found)


def test_a_large_tensor_is_sampled_in_sixteen_blocks_of_4_kib():
    numbers = torch.randn(50_000)  # 200 000 bytes
    data = numbers.numpy().tobytes()
    starts = [(len(data) - 4096) * k // 15 for k in range(16)]
    label = b"w torch.float32 (50000,)\n"
    sampled = hashlib.sha256(label + b"".join(data[s : s + 4096] for s in starts)).hexdigest()
    whole = fingerprint({"w": numbers})
    of_all = hashlib.sha256(label + hashlib.sha256(data).digest()).hexdigest()
    assert whole == {"sha256": of_all, "sampled": sampled}
    covered = {byte // 4 for s in starts for byte in range(s, s + 4096)}
    for index in (0, 511, starts[7] // 4 + 1, 49_999, 1_100, 25_500):
        other = numbers.clone()
        other[index] += 1
        now = fingerprint({"w": other})
        assert now["sha256"] != whole["sha256"]
        assert (now["sampled"] != whole["sampled"]) == (index in covered), index
    assert {1_100, 25_500}.isdisjoint(covered)


def test_the_fingerprint_does_not_depend_on_the_shards(pairs):
    results = []
    for base, finetuned in pairs.values():
        found = survey(Checkpoint(base), Checkpoint(finetuned), describe(finetuned))
        assert found.fingerprint == fingerprint(checkpoint_tensors(base))
        results.append(found.fingerprint)
    assert results[0] == results[1]


def test_another_base_is_refused_by_name():
    ours, theirs = fingerprint(SMALL), fingerprint({"a": torch.ones(1)})
    check_fingerprint(ours, ours, "base")
    with pytest.raises(FingerprintError, match="mybase is not the base") as caught:
        check_fingerprint(theirs, ours, "mybase")
    assert ours["sha256"][:16] in str(caught.value) and theirs["sha256"][:16] in str(caught.value)
