"""A fine-tune compressed by any method, as a model in memory: bench_accuracy.py's arithmetic.

Methods differ in the linear layers of the blocks alone. What is left, the embedding (here the head
too), norms and biases, is in every model as preset `adamix` compresses or stores it at that ratio,
and its bytes count in every row. Each matrix of the blocks has the same bits a weight, those that
this project's budget for the ratio gives it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from answers import block_linears
from method_processes import processes
from safetensors.torch import load_file
from scale_distillation import distilled
from torch import Tensor
from transformers import PreTrainedModel

import adamix
from adamix.budget import COUNTS_BYTES
from adamix.calibration.gram import accumulate, gram_matrices, shared_inputs
from adamix.calibration.layers import find_layers
from adamix.config import MODEL_BITS
from adamix.merging import restored_model
from adamix.parallel import workers
from adamix.storage.log import TOKENS_FILE

ONE_BUDGET, TUNED = "adamix, one budget", "adamix, tuned"
DISTILLED = "BitDelta, distilled"
PRESETS = {"adamix": adamix.Config(), "paper": adamix.Config.preset("paper"),
           ONE_BUDGET: adamix.Config(allocate="model"),
           TUNED: adamix.Config()}  # and then `adamix.tune`
ANY_SIZE = 2**62  # bits, for a method that has one size only


class NoSuchSize(Exception):
    """A method has no size so small for some matrix."""


@dataclass(frozen=True)
class Compressed:
    """A delta folder of this project's."""

    folder: Path
    delta: adamix.ModelDelta
    summary: adamix.Summary
    ratio: float

    @property
    def beside(self) -> int:
        """Bytes of all but the compressed matrices."""
        return self.summary.bytes - sum(one.nbytes for one in self.delta.matrices.values())

    def budget_bits(self, name: str) -> int:
        """What a matrix may take, as this project's budget has it: its share of what the ratio
        leaves beside the rest, and a row of the table of counts."""
        counts = COUNTS_BYTES * len(self.delta.matrices)
        left = int(self.summary.bytes_16bit / self.ratio) - self.beside - counts
        weights = sum(one.shape[0] * one.shape[1] for one in self.delta.matrices.values())
        shape = self.delta.matrices[name].shape
        return 8 * left * shape[0] * shape[1] // weights + 8 * COUNTS_BYTES


@dataclass(frozen=True)
class Result:
    """A model whose blocks one method has restored."""

    model: PreTrainedModel
    bytes: int
    error: float  # mean of the matrices, on the calibration's inputs
    error_held_out: float  # on those of the held-out prompts
    seconds: float


@dataclass
class Compression:
    """One fine-tune with one seed of calibration; what several methods need is made once."""

    base: Path
    finetuned: Path
    base_model: PreTrainedModel  # both fp32, on the device
    reference: PreTrainedModel
    config: adamix.Config  # sequences, their length, seed
    folder: Path  # for delta folders
    held_out: list[Tensor]  # token ids of prompts with their answers

    def __post_init__(self) -> None:
        self._made: dict[tuple[str, float], Compressed] = {}
        self._tokens: Tensor | None = None
        self._frames: dict[Path, PreTrainedModel] = {}  # the last one

    def compressed(self, preset: str, ratio: float) -> Compressed:
        """By this project's method; the first call samples the tokens that all others use too."""
        if (preset, ratio) not in self._made:
            make = self._tuned if preset == TUNED else self._compressed
            self._made[preset, ratio] = make(self.folder / f"{preset}-{ratio:g}", preset, ratio)
        return self._made[preset, ratio]

    def _compressed(self, out: Path, preset: str, ratio: float) -> Compressed:
        # On a GPU only where this project's kernels are built for one.
        device = None if self.reference.device.type == "cuda" else "cpu"
        config = replace(PRESETS[preset], ratio=ratio, seed=self.config.seed,
                         sample_from=self.config.sample_from, gain=self.config.gain,
                         calibration_sequences=self.config.calibration_sequences,
                         calibration_length=self.config.calibration_length)
        summary = adamix.compress(self.base, self.finetuned, out, config,
                                  calibration=self._tokens, device=device)
        if self._tokens is None:
            self._tokens = load_file(out / TOKENS_FILE)["input_ids"].long()
        return Compressed(out, adamix.load(out), summary, ratio)

    def _tuned(self, out: Path, _: str, ratio: float) -> Compressed:
        before = self.compressed("adamix", ratio)
        adamix.tune(self.base, self.finetuned, before.folder, out,
                    device=str(self.reference.device))
        return replace(before, folder=out, delta=adamix.load(out))

    @property
    def tokens(self) -> Tensor:
        """Of the calibration, `[sequences, length]`."""
        assert self._tokens is not None, "the first compression samples the tokens"
        return self._tokens

    @cached_property
    def deltas(self) -> dict[str, Tensor]:
        """ΔW of every linear layer of the blocks, on the CPU."""
        before = block_linears(self.base_model)
        return {name: (layer.weight - before[name].weight).detach().cpu()
                for name, layer in block_linears(self.reference).items()}

    @cached_property
    def grams(self) -> dict[str, Tensor]:
        """X Xᵀ of every such layer over the calibration's tokens, on the CPU."""
        layers = find_layers(self.reference, set(self.deltas))
        groups = shared_inputs(self.reference, self.tokens, layers)
        with workers(1 if self.reference.device.type == "cuda" else None) as executor:
            sums = accumulate(self.reference, self.tokens, {name: layers[name] for name in groups},
                              executor=executor)
        return {name: sums[leader].cpu() for leader, names in groups.items() for name in names}

    @cached_property
    def held_out_grams(self) -> dict[str, Tensor]:
        """The same over the held-out prompts and their answers."""
        layers = find_layers(self.reference, set(self.deltas))
        groups = shared_inputs(self.reference, self.held_out[0][None], layers)

        def forward(ids: Tensor) -> None:
            self.reference(input_ids=ids[None].to(self.reference.device), use_cache=False)

        with workers(1) as executor:
            sums = gram_matrices(forward, self.held_out, {name: layers[name] for name in groups},
                                 executor=executor, ahead=1)
        return {name: sums[leader].cpu() for leader, names in groups.items() for name in names}

    def by_preset(self, preset: str, ratio: float) -> Result:
        """The blocks by this project's method with a preset; with one budget for all matrices, and
        with tuned scales, the rest of the model too."""
        start = time.perf_counter()
        own = self.compressed(preset, ratio)
        frame = own if preset in (ONE_BUDGET, TUNED) else self.compressed("adamix", ratio)
        packed = {name: own.delta.matrices[f"{name}.weight"] for name in self.deltas}
        return self.result(frame, {name: one.dequantize() for name, one in packed.items()},
                            8 * sum(one.nbytes for one in packed.values()), start)

    def by_method(self, method: Callable[..., object], ratio: float, *, one_size: bool) -> Result:
        """The blocks by one of `methods/`, or another that `method_processes` can call.

        Raises:
            NoSuchSize: a matrix has none so small.
        """
        frame, grams = self.compressed("adamix", ratio), self.grams
        pool = processes()
        pool.prepare(method)
        start = time.perf_counter()

        def one(name: str) -> object:
            budget = ANY_SIZE if one_size else frame.budget_bits(f"{name}.weight")
            result = pool.call(method, self.deltas[name], grams[name], budget)
            if result is None:
                raise NoSuchSize(f"has no size so small for {name}")
            if result.bits > budget:
                raise RuntimeError(f"{result.bits} bits of {budget} for {name}")
            return result

        # The largest first: none of them is then left over for a single core at the end.
        largest = sorted(self.deltas, reverse=True, key=lambda name: (
            self.deltas[name].numel() * self.deltas[name].shape[1]))
        with workers(len(pool)) as executor:
            begun = {name: executor.submit(one, name) for name in largest}
            results = {name: begun[name].result() for name in self.deltas}
        return self.result(frame, {name: result.dense for name, result in results.items()},
                            sum(result.bits for result in results.values()), start)

    def by_distillation(self, ratio: float) -> Result:
        """The blocks by BitDelta with its scales trained; of one size."""
        frame = self.compressed("adamix", ratio)
        model = self.frame(frame).requires_grad_(False)
        weights = {name: layer.weight.detach()
                   for name, layer in block_linears(self.base_model).items()}
        start = time.perf_counter()
        dense = distilled(model, weights, self.deltas, self.reference,
                          self.tokens.to(self.reference.device))
        return self.result(frame, dense, sum(one.numel() + 16 for one in dense.values()), start)

    def frame(self, frame: Compressed) -> PreTrainedModel:
        """What preset `adamix` restores; methods put other linear layers into it."""
        if frame.folder not in self._frames:
            self._frames = {frame.folder: restored_model(self.base, frame.folder).to(
                self.reference.device)}
        return copy.deepcopy(self._frames[frame.folder])

    @torch.no_grad()
    def result(self, frame: Compressed, dense: dict[str, Tensor], bits: int, start: float
               ) -> Result:
        """The model with these ΔW, of `bits` in all, timed from `start` on."""
        seconds = time.perf_counter() - start
        model = self.frame(frame)
        before = block_linears(self.base_model)
        for name, layer in block_linears(model).items():
            layer.weight.copy_(before[name].weight + dense[name].to(layer.weight))
        errors = [sum(adamix.relative_error(*(part.to(self.reference.device) for part in (
            delta, dense[name], grams[name]))) for name, delta in self.deltas.items())
            / len(self.deltas) for grams in (self.grams, self.held_out_grams)]
        others = sum(one.nbytes for name, one in frame.delta.matrices.items()
                     if name.removesuffix(".weight") not in self.deltas)
        return Result(model, frame.beside + others + -(-bits // 8), *errors, seconds)


def model_bytes(model: PreTrainedModel) -> int:
    """In 16 bits."""
    return MODEL_BITS // 8 * sum(parameter.numel() for parameter in model.parameters())
