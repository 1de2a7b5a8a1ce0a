"""What the model's own code says of its tensors, from an empty (meta-device) model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adamix.experts import expert_parameters, is_experts
from adamix.source.models import empty_model
from adamix.source.parts import Part, find_parts


@dataclass(frozen=True)
class Architecture:
    """Names of weights, as the checkpoint has them, by what they are used as."""

    # Every linear layer's weight: of nn.Linear, the output head's included, of Conv1D, and of each
    # expert of a layer; `N.3` is that of expert 3 where the tensor N holds all of them.
    linears: frozenset[str]
    embedding: str | None  # the input embedding's weight
    head: str | None  # the output head's weight (`lm_head.weight`), if it has one
    tied: bool  # the head's weight is the embedding's
    vocabulary: int  # rows of the input embedding
    hidden: int  # size of a hidden state
    transposed: frozenset[str] = frozenset()  # those of `linears` that are stored [in, out]
    stacks: frozenset[str] = frozenset()  # tensors [experts, .., ..] of linear layers
    outside: frozenset[str] = frozenset()  # tensors of a vision tower: not the language model's
    parts: Mapping[str, Part] = field(default_factory=dict, compare=False)  # every tensor's

    @property
    def experts(self) -> set[str]:
        """Tensors of experts, by themselves or in a stack."""
        return {name for name, part in self.parts.items() if part.expert is not None} | self.stacks

    def input_of(self, linear: str) -> str:
        """What calibration calls the inputs that a weight multiplies: its module's name, or the
        experts' parameter with the expert's number."""
        if linear in self.parts:
            return self.parts[linear].input
        stack, _, expert = linear.rpartition(".")
        if stack in self.stacks:
            return f"{self.parts[stack].parameter}.{expert}"
        return linear.removesuffix(".weight")


def describe(folder: Path, names: Collection[str] | None = None) -> Architecture:
    """Build the model of `folder/config.json` without weights and read off its layers.

    Args:
        folder: of the checkpoint.
        names: of its tensors. Default: those that transformers would write.

    Raises:
        CheckpointError: transformers knows no causal language model of this config.
    """
    model = empty_model(folder)
    parts = find_parts(model, names)
    linears, transposed, stacks = _linears(model, parts)
    embedding = model.get_input_embeddings()
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    head_name = _name_of(model.get_output_embeddings(), model, parts)
    return Architecture(
        frozenset(linears), _name_of(embedding, model, parts), head_name,
        tied and head_name is not None, embedding.weight.shape[0],
        model.config.get_text_config().hidden_size, frozenset(transposed), frozenset(stacks),
        _outside(model, parts), parts)


def _outside(model: PreTrainedModel, parts: Mapping[str, Part]) -> frozenset[str]:
    """Tensors that are not the language model's, in a model of several kinds of input."""
    if model.config.get_text_config() is model.config:
        return frozenset()
    layers = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    inside = tuple(f"{name}." for name, module in model.named_modules()
                   if module in layers and name)
    return frozenset(name for name, part in parts.items() if not part.parameter.startswith(inside))


def _name_of(layer: nn.Module | None, model: PreTrainedModel, parts: Mapping[str, Part]
             ) -> str | None:
    """What the checkpoint calls a layer's weight; the model's own name where it has it not."""
    own = next((f"{name}.weight" for name, module in model.named_modules() if module is layer),
               None)
    return next((name for name, part in parts.items() if part.parameter == own), own)


def _linears(model: PreTrainedModel, parts: Mapping[str, Part]
             ) -> tuple[set[str], set[str], set[str]]:
    """Names of all weights of linear layers, of those stored [in, out], and of stacks."""
    by_parameter: dict[str, list[str]] = {}
    for name, part in parts.items():
        by_parameter.setdefault(part.parameter, []).append(name)
    linears, transposed, stacks = set(), set(), set()
    for parameter, turned in _parameters(model):
        for name in by_parameter.get(parameter, [parameter]):
            part = parts.get(name)
            if part is None or (part.expert is None and len(part.shape) == 2):
                found, swapped = [name], turned
            elif part.expert is None:
                stacks.add(name)
                found, swapped = [f"{name}.{i}" for i in range(part.shape[0])], turned
            elif part.axis == int(turned) or part.end - part.begin == part.shape[1 + part.axis]:
                found, swapped = [name], turned != part.turned
            else:
                continue  # some of an expert's inputs: its outputs are no sum of the others'
            linears.update(found)
            transposed.update(found if swapped else [])
    return linears, transposed, stacks


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, bool]]:
    """The parameters that are linear layers' weights, and whether they are [.., in, out]."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield f"{name}.weight", isinstance(module, Conv1D)
        elif is_experts(module):
            for parameter in expert_parameters(module):
                yield f"{name}.{parameter}", bool(module.is_transposed)
