"""X Xᵀ with one block in memory at a time: bit by bit those of the whole model's forward pass."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from routed_models import ARCHITECTURES, VOCABULARY, random_model
from tiny_models import compressed_pair
from torch import nn
from transformers import AutoModelForCausalLM

from adamix.calibration import blocks
from adamix.calibration.blocks import BlockStream, Unsuited
from adamix.calibration.gram import CHUNK, accumulate, shared_inputs
from adamix.calibration.layers import find_layers
from adamix.errors import CheckpointError, NonFiniteError
from adamix.source.checkpoints import Checkpoint
from adamix.source.models import load_model, skeleton
from adamix.source.parts import ModelTensors, find_parts

TOKENS = torch.randint(3, VOCABULARY, (2 * CHUNK + 3, 12),
                       generator=torch.Generator().manual_seed(0))
LARGE = 2**30


class Everything:
    """Holds every name."""

    def __contains__(self, name):
        return True


def linears(model):
    return find_layers(model, Everything())


def whole_grams(folder):
    """The groups, and the Gram matrices of their leaders, by the whole model's forward pass."""
    model = load_model(folder)
    groups = shared_inputs(model, TOKENS, linears(model))
    modules = {name: linears(model)[name] for name in groups}
    with ThreadPoolExecutor(1) as executor:
        return groups, accumulate(model, TOKENS, modules, executor=executor)


def stream_of(folder, model=None, read=None, without=()):
    model, checkpoint = model or skeleton(folder), Checkpoint(folder)
    tensors = ModelTensors(checkpoint, find_parts(model, checkpoint.names))
    shapes = {name: shape for name, shape in tensors.shapes.items() if name not in without}
    return BlockStream(model, TOKENS, set(linears(model)), shapes, read or tensors.read)


def streamed(stream, leaders=None, threads=1, max_bytes=LARGE):
    with ThreadPoolExecutor(threads) as executor:
        return [dict(part) for part in stream.grams(
            stream.groups if leaders is None else leaders, executor=executor, threads=threads,
            max_bytes=max_bytes)]


def merged(parts):
    return {name: gram for part in parts for name, gram in part.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{architecture: a folder with a random model}, made when first asked for."""
    made = {}

    def make(architecture):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            random_model(architecture).to(torch.bfloat16).save_pretrained(made[architecture])
        return made[architecture]
    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_grams_of_the_blocks_are_the_whole_models_bit_by_bit(saved, architecture):
    folder = saved(architecture)
    groups, expected = whole_grams(folder)
    stream = stream_of(folder)
    assert stream.groups == groups and list(stream.groups) == list(groups)
    parts = streamed(stream)
    assert len(parts) == 3  # two blocks and the head
    got = merged(parts)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("variant", ["plain", "tied", "grown", "sharded"])
def test_checkpoints_of_every_kind_are_read(variant):
    folder = compressed_pair(variant).finetuned
    groups, expected = whole_grams(folder)
    got = merged(streamed(stream_of(folder)))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_threads_and_room_change_no_bit(saved):
    folder = saved("qwen2")
    expected = merged(streamed(stream_of(folder)))
    for threads, max_bytes in ((2, LARGE), (3, 25 * 10**4), (1, 1)):
        parts = streamed(stream_of(folder), threads=threads, max_bytes=max_bytes)
        assert len(parts) == {LARGE: 3, 25 * 10**4: 5, 1: 9}[max_bytes]
        got = merged(parts)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_only_what_is_asked_for_is_made_and_no_block_after_it_is_run(saved, monkeypatch):
    folder, run = saved("llama"), []
    expected = merged(streamed(stream_of(folder)))
    stream, run_block = stream_of(folder), BlockStream._run_block
    monkeypatch.setattr(BlockStream, "_run_block", lambda self, index, *arguments, **named: (
        run.append(index), run_block(self, index, *arguments, **named))[1])
    name = "model.layers.0.mlp.down_proj"
    got = merged(streamed(stream, [name]))
    assert got.keys() == {name} and torch.equal(got[name], expected[name]) and run == [0]
    got = merged(streamed(stream_of(folder), ["lm_head"]))
    assert torch.equal(got["lm_head"], expected["lm_head"]) and run == [0, 0, 1]


def test_one_block_at_most_is_in_memory_and_nothing_once_all_is_done(saved, monkeypatch):
    model, most = skeleton(saved("llama")), []
    stream = stream_of(saved("llama"), model)

    def resident():
        return {name for name, parameter in model.named_parameters() if not parameter.is_meta}

    assert not resident()
    run_block = BlockStream._run_block

    def spy(self, *arguments, **named):
        most.append({name.split(".")[2] for name in resident()})
        return run_block(self, *arguments, **named)

    monkeypatch.setattr(BlockStream, "_run_block", spy)
    streamed(stream)
    assert most == [{"0"}, {"1"}] and not resident()


def test_activations_that_are_not_finite_name_the_layer(saved):
    read = Checkpoint(saved("llama")).read

    def broken(name):
        tensor = read(name)
        return tensor * 3e38 if name == "model.layers.1.input_layernorm.weight" else tensor

    with pytest.raises(NonFiniteError, match="enter model.layers.1.self_attn.q_proj "):
        streamed(stream_of(saved("llama"), read=broken))


# --- models that are not of this kind ----------------------------------------------------------


def refused(folder, words, model, **options):
    with pytest.raises(Unsuited, match=words):
        stream_of(folder, model, **options)


def test_models_that_do_not_fit_are_refused_in_words(saved):
    folder = saved("llama")

    def llama(change=lambda model: None):
        model = skeleton(folder)
        change(model)
        return model

    def shared(model):
        model.model.layers[1] = model.model.layers[0]

    def tied(model):
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight

    def left_out(model):
        model.config.num_hidden_layers = 1  # as the loop over the blocks reads it

    def between(model):
        model.model.layers[0].register_forward_hook(lambda module, given, output: output + 1)

    refused(folder, "share weights", llama(shared))
    refused(folder, "share weights", llama(tied))
    refused(folder, "more than hidden states passes", llama(between))
    refused(folder, "not all of its blocks", llama(left_out))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        refused(folder, f"{name} is not in its checkpoint", llama(), without=[name])


def test_code_that_fails_without_its_weights_is_refused_in_words(saved, monkeypatch):
    model = skeleton(saved("llama"))
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward",
                        lambda self, hidden: hidden if self.up_proj.weight.sum() > 0 else -hidden)
    refused(saved("llama"), "do not run by themselves: .*meta", model)


def test_a_fault_of_the_checkpoint_is_told_as_such(saved):
    def damaged(name):
        raise CheckpointError(f"{name} is damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        stream_of(saved("llama"), read=damaged)


class OlderBlock(nn.Module):
    """Gives back a tuple, as blocks of older architectures do."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, hidden_states, mask):
        return hidden_states + self.up(hidden_states), None


class OlderModel(nn.Module):
    config, device = SimpleNamespace(), torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.layers = nn.ModuleList([OlderBlock() for _ in range(3)])

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden, weights = layer(hidden_states=hidden, mask=None)
            assert weights is None
        return self.lm_head(hidden)


def test_blocks_that_give_back_a_tuple_and_take_their_input_by_name_run_too():
    model = OlderModel().eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    with ThreadPoolExecutor(1) as executor:
        expected = accumulate(model, TOKENS, linears(model), executor=executor)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stream = BlockStream(OlderModel().eval().to("meta"), TOKENS, set(linears(model)), shapes,
                         tensors.__getitem__)
    got = merged(streamed(stream))
    assert got.keys() == expected.keys() and len(got) == 4
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("output, words", [
    (lambda hidden: (hidden, hidden), "more than hidden states"),
    (lambda hidden: hidden[:, :1], "more than hidden states")])
def test_blocks_that_give_back_something_else_are_refused(saved, monkeypatch, output, words):
    model = skeleton(saved("llama"))
    kind = type(model.model.layers[0])
    monkeypatch.setattr(kind, "forward", lambda self, hidden, **named: output(hidden))
    refused(saved("llama"), words, model)


@pytest.mark.parametrize("value", [[], {}, object()])
def test_what_could_carry_something_between_blocks_is_refused(value):
    with pytest.raises(Unsuited, match="handed a"):
        blocks._map((torch.zeros(1), value), lambda tensor: tensor)


def test_a_skeleton_has_the_buffers_of_the_loaded_model_and_no_weights(saved):
    for architecture in ("llama", "gemma3_text", "opt"):
        model = skeleton(saved(architecture))
        loaded = AutoModelForCausalLM.from_pretrained(saved(architecture), dtype=torch.float32)
        assert all(parameter.is_meta for parameter in model.parameters())
        theirs = dict(loaded.named_buffers())
        assert theirs.keys() == dict(model.named_buffers()).keys()
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, theirs[name]), name
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # modules are made as before again
