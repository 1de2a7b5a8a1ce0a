"""The layers whose inputs calibration asks for: linear ones, and the experts within a module."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adamix.calibration.sums import ALONE, Share
from adamix.experts import OneByOne, expert_parameters, expert_shape, is_experts

# An expert that saw fewer tokens than this share of its inputs gets its layer's Gram matrix. With
# random inputs of 192 features, 30 % of the covariance the expert's own, either was as good there.
LEAST_SHARE = 1 / 8


@dataclass(frozen=True)
class Expert:
    """One expert's matrix, whose inputs are the tokens that are routed to it."""

    module: nn.Module
    stack: str  # the parameter's name in the model, of all experts of the layer
    parameter: str  # its name in the module
    index: int

    @property
    def in_features(self) -> int:
        return expert_shape(self.module, self.parameter)[1]

    @property
    def least_tokens(self) -> float:
        """With fewer its Gram matrix says too little."""
        return max(1, LEAST_SHARE * self.in_features)


Layer = nn.Linear | Conv1D | Expert


def in_features(layer: Layer) -> int:
    """The size of a layer's inputs."""
    return layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features


def find_layers(model: nn.Module, wanted: Collection[str], prefix: str = "") -> dict[str, Layer]:
    """Those of `wanted` that are the model's, by name: a linear layer's, or a parameter
    `[experts, ..]`'s with an expert's number.

    Args:
        prefix: what stands before the model's own names.
    """
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        name = f"{prefix}{name}"
        if isinstance(module, (nn.Linear, Conv1D)):
            found[name] = module
        elif is_experts(module):
            for parameter in expert_parameters(module):
                stack = f"{name}.{parameter}"
                found |= {f"{stack}.{index}": Expert(module, stack, parameter, index)
                          for index in range(getattr(module, parameter).shape[0])}
    return {name: layer for name, layer in found.items() if name in wanted}


@contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Run the model's experts so that what enters them can be seen, in the block."""
    changed = [module for module in model.modules()
               if is_experts(module) and not isinstance(module.forward, OneByOne)]
    for module in changed:
        module.forward = OneByOne(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


class ExpertGrams:
    """Gives experts that saw few tokens the Gram matrix of all of their layer.

    That is the sum of the experts' own; a factor changes nothing of what is made of it. It waits
    for the last expert of the layer. Of several processes the one that has a stack's first expert
    makes that sum, and has all experts that get it.
    """

    def __init__(self, layers: Mapping[str, Layer], few: set[str] | None = None,
                 share: Share = ALONE) -> None:
        self.few = set() if few is None else few  # those that got it
        self._layers, self._share = layers, share
        self._first: dict[str, str] = {}  # the first expert of a stack
        self._missing: dict[str, set[str]] = {}  # experts of a stack that have not come yet
        self._sums: dict[str, Tensor] = {}
        for name, layer in layers.items():
            if isinstance(layer, Expert):
                self._missing.setdefault(layer.stack, set()).add(name)
                self._first.setdefault(layer.stack, name)

    def settle(self, names: Collection[str], grams: dict[str, Tensor], tokens: Mapping[str, int]
               ) -> dict[str, Tensor]:
        """What can be used of the Gram matrices of some layers.

        Args:
            names: the layers, experts of a stack in their order.
            grams: of those that had inputs and are this process's.
            tokens: how many tokens each expert saw.
        """
        ready = {name: gram for name, gram in grams.items()
                 if not isinstance(self._layers[name], Expert)}
        for name in names:
            layer = self._layers[name]
            if not isinstance(layer, Expert):
                continue
            if tokens.get(name, 0):
                self._add(layer.stack, self._share.hand_over(
                    grams.get(name), layer.in_features, name, self._first[layer.stack]))
            if tokens.get(name, 0) < layer.least_tokens:
                self.few.add(name)
            elif name in grams:
                ready[name] = grams[name]
            waiting = self._missing[layer.stack]
            waiting.discard(name)
            if not waiting:
                ready |= self._of_few(layer.stack)
        return ready

    def _add(self, stack: str, gram: Tensor | None) -> None:
        if gram is None:
            return
        if stack in self._sums:
            self._sums[stack] += gram
        else:
            self._sums[stack] = gram.clone()

    def _of_few(self, stack: str) -> dict[str, Tensor]:
        total = self._sums.pop(stack, None)
        if total is None or not torch.isfinite(total).all():
            return {}
        return {name: total for name in self._layers
                if name in self.few and self._layers[name].stack == stack}
