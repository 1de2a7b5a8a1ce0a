"""Experts: what a checkpoint's tensors are in the model, their inputs, and those that see few."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from routed_models import ARCHITECTURES, OTHERS, VOCABULARY, random_model
from safetensors.torch import load_file, save_file
from test_blocks import Everything, merged, stream_of, streamed
from test_families import CONFIG, random_pair
from tiny_models import checkpoint_tensors, decaying_delta
from tiny_models import one_thread as one_thread
from torch.nn import functional as F

from adamix import matrices
from adamix.calibration.blocks import Unsuited
from adamix.calibration.gram import accumulate
from adamix.calibration.layers import ExpertGrams, experts_one_by_one, find_layers
from adamix.errors import DeltaFileError, FingerprintError
from adamix.experts import is_experts
from adamix.memory import MemoryPlan, sizes
from adamix.merging import merge
from adamix.pipeline import compress
from adamix.source.architecture import describe
from adamix.source.checkpoints import Checkpoint
from adamix.source.models import load_model
from adamix.source.parts import ModelTensors, Part, _Marks, find_parts
from adamix.storage.file import read_delta, read_manifest
from adamix.storage.log import read_log

MOE = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"]
TOKENS = torch.randint(3, VOCABULARY, (11, 12), generator=torch.Generator().manual_seed(0))


def experts_of(model):
    return {name: module for name, module in model.named_modules() if is_experts(module)}


# --- a checkpoint's tensors in the model --------------------------------------------------------


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_the_parts_of_a_checkpoint_are_the_models_parameters_as_transformers_loads_them(
        tmp_path, architecture):
    random_model(architecture).save_pretrained(tmp_path)
    checkpoint, model = Checkpoint(tmp_path), load_model(tmp_path)
    tensors = ModelTensors(checkpoint, find_parts(model, checkpoint.names))
    own = dict(model.named_parameters())
    assert tensors.shapes == {name: tuple(parameter.shape) for name, parameter in own.items()}
    for name, parameter in own.items():
        assert torch.equal(tensors.read(name), parameter), name


def test_a_checkpoint_of_the_base_model_alone_lacks_the_prefix():
    """As those of GPT-2 on the Hub."""
    model = random_model("gpt2")
    names = ["h.0.attn.c_attn.weight", "wte.weight", "h.0.attn.masked_bias"]
    parts = find_parts(model, names)
    assert {name: part.parameter for name, part in parts.items()} == {
        name: f"transformer.{name}" for name in names[:2]}


def test_blocks_of_an_experts_matrix_are_recognised_however_they_are_cut():
    parts = [Part("a", (3, 20, 18)), Part("b", (2, 8, 30))]
    marks = _Marks(parts)
    a, b = marks.stand_ins()
    assert marks.part_of(a[2]) == Part("a", (3, 20, 18), 2, 0, 0, 20, False)
    assert marks.part_of(b[1, 2:]) == Part("b", (2, 8, 30), 1, 0, 4, 8, False)
    assert marks.part_of(b[0, :, 3:]) == Part("b", (2, 8, 30), 0, 1, 15, 30, False)
    assert marks.part_of(a[1].T) == Part("a", (3, 20, 18), 1, 0, 0, 20, True)
    assert marks.part_of(a[1, :, :3].T) == Part("a", (3, 20, 18), 1, 1, 0, 9, True)
    for cut in (a[1, ::2], a[1, :, ::2], a[:, 0], a[0, :2, :3], a[0].flip(0)):
        assert marks.part_of(cut) is None
    assert marks.part_of(a) is None and marks.part_of(a[0].to("meta")) is None


@pytest.mark.parametrize("architecture, linears, transposed, stacks", [
    ("gpt2", 2 * 4 + 1, 2 * 4, 0), ("mixtral", 2 * (4 + 3 * 4) + 1, 0, 0),
    ("qwen3_moe", 2 * 4 + 3 * 4 + 3 + 1, 0, 0), ("gpt_oss", 2 * (4 + 2 * 4) + 1, 2 * 2 * 4, 4),
    ("granitemoe", 2 * (4 + 2 * 4) + 1, 0, 4)])
def test_every_matrix_of_linear_layers_and_experts_is_found(
        tmp_path, architecture, linears, transposed, stacks):
    random_model(architecture).save_pretrained(tmp_path)
    found = describe(tmp_path, Checkpoint(tmp_path).names)
    assert len(found.linears) == linears and len(found.transposed) == transposed
    assert len(found.stacks) == stacks and found == describe(tmp_path)


# --- what enters them ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", MOE)
@torch.inference_mode()
def test_experts_one_by_one_compute_what_the_module_does(architecture):
    model = random_model(architecture)
    expected = model(input_ids=TOKENS).logits
    with experts_one_by_one(model):
        got = model(input_ids=TOKENS).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert all("forward" not in vars(module) for module in experts_of(model).values())


def expected_grams(model):
    """{expert's matrix: X Xᵀ} of a float64 copy, from the modules' definition by hand."""
    exact, found = copy.deepcopy(model).double(), {}
    exact.set_experts_implementation("eager")

    def see(name):
        def hook(module, given, named):
            hidden, index = given[0], given[1]
            turned, bias = module.is_transposed, module.has_bias
            for e in range(module.down_proj.shape[0]):
                x = hidden[(index == e).any(dim=-1)]
                weight = module.gate_up_proj[e].T if turned else module.gate_up_proj[e]
                y = F.linear(x, weight, module.gate_up_proj_bias[e] if bias else None)
                y = module._apply_gate(y)
                found[f"{name}.gate_up_proj.{e}"] = x.T @ x
                found[f"{name}.down_proj.{e}"] = y.T @ y
        return hook

    for name, module in experts_of(exact).items():
        module.register_forward_pre_hook(see(name), with_kwargs=True)
    with torch.inference_mode():
        exact(input_ids=TOKENS)
    return found


@pytest.mark.parametrize("architecture", MOE)
def test_an_experts_gram_matrix_is_that_of_the_tokens_routed_to_it(architecture):
    model, seen = random_model(architecture), {}
    layers = {name: layer for name, layer in find_layers(model, Everything()).items()
              if ".experts." in name}
    with ThreadPoolExecutor(1) as executor:
        got = accumulate(model, TOKENS, layers, executor=executor, seen=seen)
    expected = expected_grams(model)
    assert got.keys() == {name for name, gram in expected.items() if gram.any()}
    for name, gram in got.items():
        exact = expected[name]
        assert (gram - exact).abs().max() <= 1e-4 * exact.diagonal().max(), name
    stack = next(iter(layers)).rpartition(".")[0]
    choices = model.config.num_experts_per_tok
    assert sum(n for name, n in seen.items() if stack in name) == choices * TOKENS.numel()


# --- experts that see few tokens ----------------------------------------------------------------


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory):
    """Folders of a base and a fine-tune whose router never takes expert 3, nor expert 1 in layer
    1, and whose other changes are few: of expert 2's down_proj alone in layer 1."""
    folder, (base, finetuned) = tmp_path_factory.mktemp("lopsided"), random_pair("gpt_oss")
    for model in (base, finetuned):
        for layer, experts in ((0, [3]), (1, [1, 3])):
            model.model.layers[layer].mlp.router.bias.data[experts] = -1e3
    down = [model.model.layers[1].mlp.experts.down_proj for model in (base, finetuned)]
    down[1].data[[0, 1, 3]] = down[0].data[[0, 1, 3]]
    for model, name in ((base, "base"), (finetuned, "finetuned")):
        model.save_pretrained(folder / name)
    compress(folder / "base", folder / "finetuned", folder / "delta", CONFIG, threads=1)
    return folder


STACK = "model.layers.{}.mlp.experts.{}"


def test_an_expert_without_tokens_gets_its_layers_gram_matrix_and_the_log_says_so(lopsided):
    rows = {row.name: row for row in read_log(lopsided / "delta")}
    starved = {f"{STACK.format(layer, name)}.{i}" for layer, name, i in (
        (0, "gate_up_proj", 3), (0, "down_proj", 3), (1, "gate_up_proj", 1),
        (1, "gate_up_proj", 3))}
    assert {name for name, row in rows.items() if row.gram == "layer"} == starved
    assert rows["model.embed_tokens.weight"].gram == "identity"
    assert all(0 < rows[name].relative_error < 0.1 for name in starved)
    header = (lopsided / "delta" / "compression_log.csv").read_text().split("\n")[0]
    assert header.strip().endswith("seconds,gram")


def test_the_layers_gram_matrix_is_the_sum_of_its_experts_whatever_the_passes(lopsided):
    stream = stream_of(lopsided / "finetuned")
    found = merged(streamed(stream))
    for layer, few in ((0, [3]), (1, [1, 3])):
        for name in ("gate_up_proj", "down_proj"):
            stack = STACK.format(layer, name)
            total = sum(found[f"{stack}.{i}"] for i in range(4) if i not in few)
            for i in few:
                assert torch.equal(found[f"{stack}.{i}"], total) and f"{stack}.{i}" in (
                    stream.few_tokens)
    for max_bytes in (1, 10**5):
        parts = streamed(other := stream_of(lopsided / "finetuned"), max_bytes=max_bytes)
        assert len(parts) > 3 and other.few_tokens == stream.few_tokens
        again = merged(parts)
        assert again.keys() == found.keys()
        assert all(torch.equal(again[name], found[name]) for name in found)


def test_few_tokens_are_fewer_than_an_eighth_of_the_inputs():
    layers = {name: layer for name, layer in find_layers(
        random_model("mixtral"), Everything()).items() if "0.mlp.experts.down_proj" in name}
    names, grams = list(layers), {name: i * torch.eye(96) for i, name in enumerate(layers, 1)}
    experts = ExpertGrams(layers)
    first = experts.settle(names[:3], dict(list(grams.items())[:3]),
                           {names[0]: 12, names[1]: 11, names[2]: 1000})
    assert first.keys() == {names[0], names[2]} and first[names[0]][0, 0] == 1
    last = experts.settle(names[3:], {names[3]: grams[names[3]]}, {names[3]: 13})
    assert last.keys() == {names[1], names[3]} and experts.few == {names[1]}
    assert torch.equal(last[names[1]], 10 * torch.eye(96))


def test_experts_that_are_the_bases_are_stored_nowhere_and_come_back_bit_by_bit(lopsided, tmp_path):
    delta, stack = read_delta(lopsided / "delta"), STACK.format(1, "down_proj")
    assert [name for name in delta.matrices if name.startswith(stack)] == [f"{stack}.2"]
    merge(lopsided / "base", lopsided / "delta", tmp_path / "out")
    base, got, finetuned = (checkpoint_tensors(folder)[stack] for folder in (
        lopsided / "base", tmp_path / "out", lopsided / "finetuned"))
    assert torch.equal(got[[0, 1, 3]], base[[0, 1, 3]]) and not torch.equal(got[2], base[2])
    assert (got[2] - finetuned[2]).norm() < 0.3 * (base[2] - finetuned[2]).norm()


def test_a_bound_on_memory_and_threads_change_no_byte(lopsided, tmp_path):
    compress(lopsided / "base", lopsided / "finetuned", tmp_path / "delta", CONFIG, threads=2,
             max_memory=3 * 10**9)
    for name in ("delta.safetensors", "delta_config.json"):
        assert (tmp_path / "delta" / name).read_bytes() == (lopsided / "delta" / name).read_bytes()


def test_the_narrowest_plan_and_the_model_in_memory_whole_change_no_byte(
        lopsided, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "plan_memory",
                        lambda *arguments: MemoryPlan(10**9, 1, 10**8, 1, True))
    streams, stream = [], matrices.BlockStream

    def unsuited(*arguments):
        raise Unsuited("its blocks share weights")

    for name, kind in (("narrow", lambda *given: (streams.append(1), stream(*given))[1]),
                       ("whole", unsuited)):
        monkeypatch.setattr(matrices, "BlockStream", kind)
        compress(lopsided / "base", lopsided / "finetuned", tmp_path / name, CONFIG, threads=2,
                 max_memory=3 * 10**9)
        for file in ("delta.safetensors", "delta_config.json"):
            expected = (lopsided / "delta" / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == expected
    assert streams == [1]


def test_one_expert_at_a_time_counts_for_memory():
    shapes = {"layers.0.up.weight": (32, 8), "layers.0.experts.0.w.weight": (40, 8),
              "layers.0.experts.1.w.weight": (40, 8), "layers.0.stack": (4, 30, 8)}
    experts = [name for name in shapes if "up" not in name]
    found = sizes(shapes, [(32, 8), (40, 8)], 8, (16, 10), whole=False, experts=experts)
    assert found.activations == 4 * 80 * (2 * 32 + 8 * 8 + 4 * 48)
    assert found.resident == 4 * (256 + 2 * 320 + 960) + 2 * (2 * 320 + 960) + 4 * 8**2


# --- the file -----------------------------------------------------------------------------------


def test_a_folder_says_what_is_transposed_in_a_version_of_its_own(lopsided, tmp_path):
    manifest = read_manifest(lopsided / "delta")
    assert set(manifest.transposed) == {
        "model.layers.*.mlp.experts.gate_up_proj.*", "model.layers.*.mlp.experts.down_proj.*"}
    body = json.loads((lopsided / "delta" / "delta_config.json").read_text())
    assert body["format_version"] == 4
    for change, words in (({"format_version": 3}, "format_version 3, this adamix reads 4"),
                          ({"transposed": []}, "format_version 4, this adamix reads 3"),
                          ({"transposed": ["x"]}, "transposed is not in compressed")):
        (tmp_path / "delta_config.json").write_text(json.dumps(body | change))
        with pytest.raises(DeltaFileError, match=words):
            read_manifest(tmp_path)


@pytest.mark.parametrize("experts", [3, 5])
def test_a_base_with_other_experts_is_refused_by_name(lopsided, tmp_path, experts):
    base, stack = lopsided / "base", STACK.format(0, "down_proj")
    tensors = load_file(base / "model.safetensors")
    wider = decaying_delta(tensors[stack][0], torch.Generator())
    tensors[stack] = torch.cat([tensors[stack], wider[None]])[:experts].clone()
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    words = f"it has no {stack}.3" if experts == 3 else "its tensors hash to"
    with pytest.raises(FingerprintError, match=words):
        merge(tmp_path, lopsided / "delta", tmp_path / "out")
    assert not (tmp_path / "out").exists()
