"""Every family of models: compress, file, merge, and logits as near as the log predicts."""

import copy
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from routed_models import VISION, random_model
from safetensors.torch import load_file
from scales_by_hooks import assert_hooks_compute_what_the_scales_do
from tiny_models import checkpoint_tensors, decaying_delta
from tiny_models import one_thread as one_thread
from torch import Tensor
from transformers import PreTrainedModel

import adamix
from adamix.config import Config
from adamix.errors import BankError
from adamix.merging import merge, restored_model
from adamix.naming import read_indices
from adamix.pipeline import compress
from adamix.progress import Silent
from adamix.storage.file import read_delta
from adamix.storage.log import read_log

CONFIG = Config(bits_per_weight=3.0, bit_widths=(8, 4, 2), calibration_sequences=8,
                calibration_length=24, passes=1)
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2",
            "mixtral", "qwen3_moe", "gpt_oss", "granitemoe", *VISION]
# What is kept whole of two dimensions and more: positions, routers, biases of experts.
WHOLE = {"gpt2": {"transformer.wpe.weight"},
         "mixtral": {"model.layers.*.block_sparse_moe.gate.weight"},
         "llava": {"vision_tower.embeddings.patch_embedding.weight",
                   "vision_tower.embeddings.position_embedding.weight"},
         "qwen2_5_vl": {"visual.patch_embed.proj.weight"},
         "qwen3_moe": {"model.layers.*.mlp.gate.weight"},
         "granitemoe": {"model.layers.*.block_sparse_moe.router.layer.weight"},
         "gpt_oss": {"model.layers.*.mlp.router.weight",
                     "model.layers.*.mlp.experts.down_proj_bias",
                     "model.layers.*.mlp.experts.gate_up_proj_bias"}}
# Energy of the logits' error over its prediction, at most: the prediction adds up what errors of
# the log's sizes would do alone, each along its own delta (as large on the calibration inputs, but
# of another direction). Over these families the two differ by a factor of 2 at most.
MARGIN = 3.0


class Stages(Silent):
    """Notes the stages' titles."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def stage(self, title: str, total: int) -> None:
        self.titles.append(title)


@dataclass
class Family:
    """A random base, its fine-tune, and what `compress` and `merge` made of them."""

    models: tuple[PreTrainedModel, PreTrainedModel]
    folder: Path  # with base, finetuned, delta and merged
    stages: list[str]


FOLDERS: list[TemporaryDirectory] = []  # removed when the process ends


def random_pair(architecture: str, *, tower: bool = True
                ) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Every parameter of the fine-tune differs from the base's, a vision tower's if `tower`."""
    base, generator = random_model(architecture), torch.Generator().manual_seed(7)
    finetuned = copy.deepcopy(base)
    for name, parameter in finetuned.named_parameters():
        old = parameter.data
        if tower or "vis" not in name:
            parameter.data = old + (
                torch.stack([decaying_delta(matrix, generator) for matrix in old])
                if old.dim() == 3 else decaying_delta(old.flatten(1) if old.dim() > 3 else old,
                                                      generator).view(old.shape))
    return base, finetuned


@cache
def family(architecture: str) -> Family:
    """Made once a process; its folders must be left as they are."""
    FOLDERS.append(TemporaryDirectory(prefix="adamix-tests-"))
    folder, stages = Path(FOLDERS[-1].name), Stages()
    models = random_pair(architecture)
    for model, name in zip(models, ("base", "finetuned"), strict=True):
        model.save_pretrained(folder / name)
    compress(folder / "base", folder / "finetuned", folder / "delta", CONFIG, threads=1,
             progress=stages)
    merge(folder / "base", folder / "delta", folder / "merged", dtype="float32")
    return Family(models, folder, stages.titles)


tensors_of = cache(checkpoint_tensors)


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.double()


def blended(family: Family, name: str, share: float) -> tuple[str, Tensor]:
    """A checkpoint's tensor between fine-tune (0) and base (1), or with one slice so."""
    sides = [tensors_of(family.folder / side) for side in ("finetuned", "base")]
    if name in sides[0]:
        return name, torch.lerp(sides[0][name], sides[1][name], share)
    stack, _, index = name.rpartition(".")
    tensor = sides[0][stack].clone()
    tensor[int(index)] = torch.lerp(*(side[stack][int(index)] for side in sides), share)
    return stack, tensor


def predicted_error(family: Family, merged: PreTrainedModel, ids: Tensor) -> float:
    """Energy of the logits' error that the log's errors stand for, one kind of matrix at a time."""
    finetuned = tensors_of(family.folder / "finetuned")
    exact, total = logits(family.models[1], ids), 0.0
    rows = read_log(family.folder / "delta")
    for kind in {row.kind for row in rows}:
        tensors = dict(finetuned)
        for row in rows:
            if row.kind == kind:
                name, tensor = blended(family, row.name, row.relative_error**0.5)
                if name == row.name:
                    tensors[name] = tensor
                else:
                    tensors[name] = tensors[name] + (tensor - finetuned[name])
        model = type(merged).from_pretrained(None, config=merged.config, state_dict=tensors)
        total += (logits(model.eval(), ids) - exact).square().sum().item()
    return total


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_of_the_merged_model_are_as_near_as_the_log_predicts(architecture):
    made = family(architecture)
    kind = type(made.models[0])
    merged, info = kind.from_pretrained(made.folder / "merged", output_loading_info=True)
    assert not any(info.values()), info
    ids = load_file(made.folder / "delta" / "calibration.safetensors")["input_ids"].long()
    base, exact, got = (logits(model.eval(), ids) for model in (*made.models, merged))
    error, predicted = (got - exact).square().sum().item(), predicted_error(made, merged, ids)
    assert error <= MARGIN * predicted
    assert predicted <= 0.2 * (base - exact).square().sum()  # says something
    restored = restored_model(made.folder / "base", made.folder / "delta")
    assert torch.equal(logits(restored, ids), got)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_matrix_of_the_merged_checkpoint_is_the_fine_tunes(architecture):
    """A delta in the wrong place, or turned the wrong way, is further off than none."""
    folder = family(architecture).folder
    base, finetuned, merged = (tensors_of(folder / name)
                               for name in ("base", "finetuned", "merged"))
    assert merged.keys() == finetuned.keys()
    delta, rows = read_delta(folder / "delta"), read_log(folder / "delta")
    compressed = {row.name if row.name in base else row.name.rpartition(".")[0] for row in rows}
    assert compressed | delta.whole.keys() == base.keys()
    large = {kind for kind, indices in delta.manifest.whole.items()
             if delta.whole[read_indices(kind, indices)[0]].dim() > 1}
    assert large == WHOLE.get(architecture, set())
    for name, tensor in merged.items():
        assert tensor.shape == finetuned[name].shape
        if name in delta.whole:
            assert torch.equal(tensor, finetuned[name])
            continue
        change, lost = finetuned[name] - base[name], finetuned[name] - tensor
        worst = lost.square().sum(dim=(-2, -1)) / change.square().sum(dim=(-2, -1))
        assert worst.max() < 0.5, name


@pytest.mark.parametrize("architecture", FAMILIES)
def test_one_decoder_block_at_a_time_is_in_memory(architecture):
    assert not [title for title in family(architecture).stages if "whole model" in title]


# What these change that no row can have of its own: biases of experts, vision towers.
UNROUTABLE = {"gpt_oss": "gate_up_proj_bias|down_proj_bias|sinks",
              "llava": "vision_tower|projector", "qwen2_5_vl": "visual"}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_routed_row_of_the_base_computes_what_the_merged_model_does(architecture):
    folder, ids = family(architecture).folder, torch.randint(3, 96, (3, 8))
    kind = type(family(architecture).models[0])
    model = kind.from_pretrained(folder / "base").eval()
    expected = logits(model, ids[:1])
    if architecture in UNROUTABLE:
        with pytest.raises(BankError, match=f"({UNROUTABLE[architecture]}).*merge it instead"):
            adamix.attach(model, {"mine": folder / "delta"})
        return
    merged = kind.from_pretrained(folder / "merged").eval()
    expected = torch.cat([expected, logits(merged, ids[1:])])
    with adamix.attach(model, {"mine": folder / "delta"}).route([None, "mine", "mine"]):
        got = logits(model, ids)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


# --- images and text ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", VISION)
def test_a_vision_tower_is_left_whole_by_a_flag(architecture, tmp_path):
    folder, named = family(architecture).folder, "vis|multi_modal_projector"
    config = replace(CONFIG, vision=False)
    compress(folder / "base", folder / "finetuned", tmp_path / "delta", config, threads=1)
    on, off = (read_delta(path / "delta") for path in (folder, tmp_path))
    inside = {name for name in on.matrices if not re.match(named, name)}
    assert off.matrices.keys() == inside < on.matrices.keys()
    assert off.whole.keys() - on.whole.keys() == on.matrices.keys() - inside
    finetuned = tensors_of(folder / "finetuned")
    assert all(torch.equal(tensor, finetuned[name]) for name, tensor in off.whole.items())
    assert "vision" not in on.manifest.config and off.manifest.config["vision"] is False


@pytest.mark.parametrize("architecture", VISION)
def test_a_fine_tune_of_the_language_model_alone_is_routed(architecture, tmp_path):
    models, ids = random_pair(architecture, tower=False), torch.randint(3, 90, (2, 8))
    models[1].load_state_dict(models[0].state_dict() | {
        name: tensor for name, tensor in models[1].state_dict().items() if "projector" not in name})
    for model, name in zip(models, ("base", "finetuned"), strict=True):
        model.save_pretrained(tmp_path / name)
    compress(tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta", CONFIG, threads=1)
    merged = logits(restored_model(tmp_path / "base", tmp_path / "delta"), ids[1:])
    expected = torch.cat([logits(models[0], ids[:1]), merged])
    model = type(models[0]).from_pretrained(tmp_path / "base").eval()
    with adamix.attach(model, {"mine": tmp_path / "delta"}).route([None, "mine"]):
        got = logits(model, ids)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_scales_can_be_tuned_in_every_linear_layer_of_the_language_model(architecture, tmp_path):
    made = family(architecture).folder
    trained = assert_hooks_compute_what_the_scales_do(made / "base", made / "delta",
                                                      tmp_path / "out")
    matrices = read_delta(made / "delta").matrices
    assert {name for name in matrices if re.search(r"(q|k|v|o|qkv|c_attn)(_proj)?\.weight$", name)
            and "vis" not in name} <= trained
