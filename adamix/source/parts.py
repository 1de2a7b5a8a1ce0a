"""Which tensor of a checkpoint is which part of a model's parameters, as transformers loads them.

Most have one name in both. Some are renamed, and the experts of a layer, which most checkpoints
hold as matrices of their own, are one parameter `[experts, .., ..]` in the model. No list says
which: transformers' conversion is run backwards on stand-ins that tell where they came from.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adamix.experts import expert_parameters, is_experts
from adamix.source.checkpoints import Checkpoint

# What raises in another transformers than these parts were found in, or in a conversion that needs
# the weights themselves: then only what has the model's own names is known.
FAULTS = (ImportError, AttributeError, ValueError, KeyError, TypeError, RuntimeError, IndexError)
ROWS, COLUMNS = 4, 6  # of a stand-in for an expert's matrix: unequal, and halves are whole numbers


@dataclass(frozen=True)
class Part:
    """A checkpoint's tensor, as a part of a parameter of the model.

    Without an expert it is the parameter; else it, or with `turned` its transpose, is
    `parameter[expert].narrow(axis, begin, end - begin)`.
    """

    parameter: str
    shape: tuple[int, ...]  # the parameter's
    expert: int | None = None
    axis: int = 0
    begin: int = 0
    end: int = 0
    turned: bool = False

    @property
    def input(self) -> str:
        """The name of what it multiplies: of its module, or of the parameter and the expert."""
        if self.expert is None:
            return self.parameter.removesuffix(".weight")
        return f"{self.parameter}.{self.expert}"


def find_parts(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Part]:
    """{a checkpoint's tensor: its part of the model}.

    Args:
        model: its parameters are not looked at, only their shapes.
        names: of the checkpoint's tensors; those that are in no way the model's are left out.
            Default: the names that transformers would save the model under.
    """
    own = {name: Part(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    saved = _as_saved(model, own)
    if names is None:
        return saved
    known = saved | own
    known |= _as_loaded(model, own, [name for name in names if name not in known])
    return {name: known[name] for name in names if name in known}


def _as_loaded(model: nn.Module, own: Mapping[str, Part], names: Collection[str]
               ) -> dict[str, Part]:
    """Those of other names, of older checkpoints or of the base model alone, that transformers
    gives a parameter's when it loads them."""
    if not names or not isinstance(model, PreTrainedModel):
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
        renamings = [one for one in get_model_conversion_mapping(model)
                     if isinstance(one, WeightRenaming)]
        loaded = {name: rename_source_key(name, renamings, [], model.base_model_prefix, dict(own))
                  for name in names}
    except FAULTS:
        return {}
    return {name: own[parameter] for name, (parameter, _) in loaded.items() if parameter in own}


def expert_names(model: nn.Module, parts: Mapping[str, Part], stack: str
                 ) -> list[tuple[int, int, list[str]]]:
    """What a checkpoint calls the experts' matrices of a parameter: (first output, the one after
    the last, the name of each expert's). Empty where it does not hold them as matrices."""
    module = model.get_submodule(stack.rpartition(".")[0])
    mine = {name: part for name, part in parts.items() if part.parameter == stack}
    experts, *sides = model.get_parameter(stack).shape
    outputs = int(module.is_transposed)
    whole = next((name for name, part in mine.items() if part.expert is None), None)
    if whole is not None:
        return [(0, sides[outputs], [f"{whole}.{i}" for i in range(experts)])]
    blocks: dict[tuple[int, int], dict[int, str]] = {}
    for name, part in mine.items():
        full = part.end - part.begin == sides[part.axis]
        if part.axis == outputs or full:
            block = (0, sides[outputs]) if full else (part.begin, part.end)
            blocks.setdefault(block, {})[part.expert] = name
    return [(*block, [names[i] for i in range(experts)])
            for block, names in sorted(blocks.items()) if len(names) == experts]


def _as_saved(model: nn.Module, own: Mapping[str, Part]) -> dict[str, Part]:
    """The parts by the names of transformers' `save_pretrained`."""
    if not isinstance(model, PreTrainedModel):
        return dict(own)
    experts = [f"{name}.{parameter}" for name, module in model.named_modules()
               if is_experts(module) for parameter in expert_parameters(module)]
    marks = _Marks([own[name] for name in experts])
    given = {name: torch.empty(part.shape, device="meta") for name, part in own.items()}
    given |= zip(experts, marks.stand_ins(), strict=True)
    whole = {id(tensor): name for name, tensor in given.items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion
        converted = revert_weight_conversion(model, dict(given))
    except FAULTS:
        return dict(own)
    found = {name: own[whole[id(tensor)]] if id(tensor) in whole else marks.part_of(tensor)
             for name, tensor in converted.items()}
    return {name: part for name, part in found.items() if part is not None}


class _Marks:
    """Stand-ins for parameters `[experts, ..]`, whose numbers tell where they stand."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts
        sizes = [part.shape[0] * ROWS * COLUMNS for part in parts]
        self._starts = [0, *accumulate(sizes)]

    def stand_ins(self) -> Iterator[Tensor]:
        """`[experts, ROWS, COLUMNS]` of each parameter."""
        for first, last in pairwise(self._starts):
            yield torch.arange(first, last, dtype=torch.float64).view(-1, ROWS, COLUMNS)

    def part_of(self, tensor: Tensor) -> Part | None:
        """What a tensor that was made of the stand-ins is; None: no block of one expert's."""
        if tensor.is_meta or tensor.dim() != 2:
            return None
        first = int(tensor[0, 0])
        which = bisect(self._starts, first) - 1
        expert, place = divmod(first - self._starts[which], ROWS * COLUMNS)
        begins = divmod(place, COLUMNS)
        part, sizes = self._parts[which], (ROWS, COLUMNS)
        matrix = torch.arange(first - place, first - place + ROWS * COLUMNS).view(sizes)
        for turned, block in ((False, tensor), (True, tensor.T)):
            for axis, begin in enumerate(begins):
                length, full = block.shape[axis], part.shape[1 + axis]
                if begin + length > sizes[axis] or full * begin % sizes[axis]:
                    continue
                if torch.equal(block, matrix.narrow(axis, begin, length).double()):
                    ends = (full * begin // sizes[axis], full * (begin + length) // sizes[axis])
                    return replace(part, expert=expert, axis=axis, begin=ends[0], end=ends[1],
                                   turned=turned)
        return None


class ModelTensors:
    """A checkpoint's tensors by the names of the model's parameters, experts put together.

    `shapes` has those that the checkpoint holds whole.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Mapping[str, Part]) -> None:
        self._checkpoint = checkpoint
        self._names: dict[str, list[tuple[str, Part]]] = {}
        for name, part in parts.items():
            if name in checkpoint:
                self._names.setdefault(part.parameter, []).append((name, part))
        self.shapes: dict[str, tuple[int, ...]] = {}
        for parameter, found in self._names.items():
            shape = found[0][1].shape
            numel = sum(math.prod(checkpoint.headers[name][0]) for name, _ in found)
            if found[0][1].expert is None:  # as the checkpoint has it, whatever the config says
                self.shapes[parameter] = checkpoint.headers[found[0][0]][0]
            elif numel == math.prod(shape):
                self.shapes[parameter] = shape

    def read(self, parameter: str) -> Tensor:
        """A parameter, as stored."""
        found = self._names[parameter]
        name, part = found[0]
        if part.expert is None:
            return self._checkpoint.read(name)
        whole = torch.empty(part.shape, dtype=self._checkpoint.headers[name][1])
        for name, part in found:
            tensor = self._checkpoint.read(name)
            whole[part.expert].narrow(part.axis, part.begin, part.end - part.begin).copy_(
                tensor.T if part.turned else tensor)
        return whole
