"""A fine-tune compressed in the order of the forward pass, each layer with the inputs that it has
in the compressed model: bench_drift.py's arithmetic."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accuracy_models import PRESETS, Compressed, Compression, Result
from answers import LINEARS, block_linears
from torch import Tensor, nn
from transformers import PreTrainedModel

import adamix
from adamix.artifacts import PackedDelta
from adamix.budget import COUNTS_BYTES
from adamix.calibration.gram import CHUNK
from adamix.compression.hessian import damp, hessian
from adamix.compression.matrix import quantize_matrix
from adamix.parallel import workers
from adamix.storage.file import write_delta
from adamix.storage.pack import pack

WRITERS = ("o_proj", "down_proj")  # what they give is added to the residual stream


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block that read the same input."""

    linears: tuple[str, ...]
    residual: str | None = None  # the norm that reads what their output is added to


STAGES = (Stage(("q_proj", "k_proj", "v_proj")), Stage(("o_proj",), "input_layernorm"),
          Stage(("gate_proj", "up_proj")), Stage(("down_proj",), "post_attention_layernorm"))


@dataclass(frozen=True)
class Variant:
    """What is compressed with which inputs."""

    own_inputs: bool = False  # H of X, not of X̂
    share: float = 0.0  # a
    damping: float = 0.1  # of the least squares; shares of the mean diagonal
    residual: float = 0.0  # share of the residual stream's drift
    kinds: tuple[str, ...] = LINEARS  # that are corrected
    scales: bool = False  # only the scales

    @property
    def sees_model(self) -> bool:
        """Whether the compressed model's inputs matter."""
        return not self.own_inputs or bool(self.share)


# --- both models, block by block -----------------------------------------------------------------


class _Stop(Exception):
    """Ends a forward pass that has shown what was asked of it."""


@contextmanager
def watching(modules: dict[str, nn.Module], last: str | None = None
             ) -> Iterator[dict[str, tuple[Tensor, dict[str, object]]]]:
    """{name: (first input, named arguments)} of what is called in the block; `last` ends it."""
    seen: dict[str, tuple[Tensor, dict[str, object]]] = {}

    def see(name: str, module: nn.Module, given: tuple[Tensor, ...], named: dict[str, object]
            ) -> None:
        seen[name] = given[0], named
        if name == last:
            raise _Stop

    hooks = [module.register_forward_pre_hook(partial(see, name), with_kwargs=True)
             for name, module in modules.items()]
    try:
        yield seen
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Entered:
    """What enters a block, of each chunk of tokens."""

    states: list[Tensor]
    named: list[dict[str, object]]  # masks, position embeddings

    @classmethod
    def first(cls, model: PreTrainedModel, tokens: Tensor) -> Entered:
        """Of the model's first block; all blocks are called with its named arguments."""
        states, named = [], []
        for chunk in tokens.split(CHUNK):
            with watching({"first": blocks_of(model)[0]}, last="first") as seen:
                model(input_ids=chunk.to(model.device), use_cache=False)
            states.append(seen["first"][0])
            named.append(seen["first"][1])
        return cls(states, named)

    def through(self, block: nn.Module) -> Entered:
        """Of the block after this one."""
        def output(hidden: Tensor, named: dict[str, object]) -> Tensor:
            given = block(hidden, **named)
            return given[0] if isinstance(given, tuple) else given

        return Entered([output(*one) for one in zip(self.states, self.named, strict=True)],
                       self.named)

    def inputs(self, block: nn.Module, names: list[str], last: str) -> list[dict[str, Tensor]]:
        """What modules of the block read, by the last part of their names, up to the module `last`.
        """
        modules = {name: one for path, one in block.named_modules()
                   if (name := path.rpartition(".")[2]) in names}
        found = []
        for hidden, named in zip(self.states, self.named, strict=True):
            with watching(modules, last) as seen:
                block(hidden, **named)
            found.append({name: one.flatten(0, -2) for name, (one, _) in seen.items()})
        return found


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_decoder().layers


# --- a layer's target ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """Over the tokens, fp64; inputs as columns."""

    gram: Tensor  # X̂ X̂ᵀ
    cross: Tensor  # (X − X̂) X̂ᵀ
    residual: Tensor | None  # (h − ĥ) X̂ᵀ

    @classmethod
    def of(cls, stage: Stage, theirs: list[dict[str, Tensor]], ours: list[dict[str, Tensor]]
           ) -> Sums:
        """A stage's, of the inputs in the fine-tune and in the compressed model by chunk."""
        def summed(name: str, drift: bool) -> Tensor:
            return sum(((one[name] - other[name] if drift else other[name]).T
                        @ other[stage.linears[0]]).double()
                       for one, other in zip(theirs, ours, strict=True))

        return cls(summed(stage.linears[0], False), summed(stage.linears[0], True),
                   summed(stage.residual, True) if stage.residual else None)


def missing(weight: Tensor, sums: Sums, variant: Variant) -> Tensor:
    """(W (X − X̂) + h − ĥ) X̂ᵀ `[out, in]` fp64, for the fine-tune's W: what the output lacks."""
    found = weight.double() @ sums.cross
    return found if sums.residual is None else found + variant.residual * sums.residual


def target(delta: Tensor, weight: Tensor, sums: Sums, variant: Variant) -> Tensor:
    """Δ* `[out, in]` fp64."""
    factor = torch.linalg.cholesky(damp(sums.gram, variant.damping))
    change = torch.cholesky_solve(missing(weight, sums, variant).T, factor).T
    return delta.double() + variant.share * change


def with_scales(packed: PackedDelta, lacking: Tensor, gram: Tensor, variant: Variant
                ) -> PackedDelta:
    """The scales s₀ times 1 + c, c so that the change of the output makes up for what it lacks,
    λ ‖c‖² added to the least squares."""
    V, U = (one.double() for one in packed.factors())
    U = U * packed.scales.double()[:, None]
    normal = (U @ U.T) * (V @ gram @ V.T)
    change = torch.linalg.solve(damp(normal, variant.damping), ((U @ lacking) * V).sum(dim=1))
    return replace(packed, scales=(packed.scales * (1 + variant.share * change)).float())


# --- a model -------------------------------------------------------------------------------------


class Drifting:
    """A pair compressed in the order of the forward pass."""

    def __init__(self, compression: Compression, ratio: float) -> None:
        self.compression = compression
        self.frame: Compressed = compression.compressed("adamix", ratio)
        self.config = replace(PRESETS["adamix"], ratio=ratio)
        self.before = block_linears(compression.base_model)
        self.after = block_linears(compression.reference)

    @torch.no_grad()
    def packed(self, variant: Variant) -> dict[str, PackedDelta]:
        """Every layer of the blocks by a variant."""
        reference, model = self.compression.reference, self.compression.frame(self.frame)
        made: dict[str, PackedDelta] = {}
        pairs = list(zip(blocks_of(reference), blocks_of(model), strict=True))
        names = {module: name for name, module in reference.named_modules()}
        if variant.sees_model:
            theirs, ours = (Entered.first(one, self.compression.tokens)
                            for one in (reference, model))
        for number, (their_block, block) in enumerate(pairs):
            if not variant.sees_model:
                made |= self._stage(names[their_block], LINEARS, variant, None, block)
                continue
            made |= self._block(names[their_block], their_block, block, theirs, ours, variant)
            if number < len(pairs) - 1:
                theirs, ours = theirs.through(their_block), ours.through(block)
        return made

    def result(self, made: dict[str, PackedDelta], start: float) -> Result:
        """The model with these, timed from `start` on."""
        bits = 8 * sum(one.nbytes for one in made.values())
        dense = {name: made[name].dequantize() for name in self.compression.deltas}
        return self.compression.result(self.frame, dense, bits, start)

    def tuned(self, made: dict[str, PackedDelta], folder: Path) -> Result:
        """The same after `adamix.tune`, the embedding's scales too; `folder` is written."""
        start, whole = time.perf_counter(), self.frame.delta
        named = {f"{name}.weight": one for name, one in made.items()}
        shutil.copytree(self.frame.folder, folder / "before")
        write_delta(replace(whole, matrices=whole.matrices | named), folder / "before")
        adamix.tune(self.compression.base, self.compression.finetuned, folder / "before",
                    folder / "after", device=str(self.compression.reference.device))
        frame = replace(self.frame, folder=folder / "after", delta=adamix.load(folder / "after"))
        dense = {name: frame.delta.matrices[f"{name}.weight"].dequantize() for name in made}
        bits = 8 * sum(one.nbytes for one in made.values())
        return self.compression.result(frame, dense, bits, start)

    def _block(self, name: str, their_block: nn.Module, block: nn.Module, theirs: Entered,
               ours: Entered, variant: Variant) -> dict[str, PackedDelta]:
        """A block stage by stage."""
        made = {}
        wanted = [one for stage in STAGES for one in (stage.linears[0], stage.residual) if one]
        their_inputs = theirs.inputs(their_block, wanted, STAGES[-1].linears[0])
        for stage in STAGES:
            wanted = [one for one in (stage.linears[0], stage.residual) if one]
            sums = Sums.of(stage, their_inputs, ours.inputs(block, wanted, stage.linears[0]))
            made |= self._stage(name, stage.linears, variant, sums, block)
        return made

    def _stage(self, block_name: str, kinds: tuple[str, ...], variant: Variant, sums: Sums | None,
               block: nn.Module) -> dict[str, PackedDelta]:
        """Layers of a block, compressed and put into the model."""
        layers = [name for name in self.after if name.startswith(f"{block_name}.")
                  and name.rpartition(".")[2] in kinds]
        own = self.compression.grams if variant.own_inputs or sums is None else None
        with workers() as executor:
            found = executor.map(lambda name: self._layer(name, variant, sums, own), layers)
            made = dict(zip(layers, found, strict=True))
        for name, packed in made.items():
            layer = block.get_submodule(name.removeprefix(f"{block_name}."))
            layer.weight.copy_(self.before[name].weight + packed.dequantize())
        return made

    @torch.no_grad()
    def _layer(self, name: str, variant: Variant, sums: Sums | None,
               own: dict[str, Tensor] | None) -> PackedDelta:
        """One layer in the bits that preset `adamix` has used for it; `own`: X Xᵀ of its inputs in
        the fine-tune, where it is these that count."""
        delta, weight = self.compression.deltas[name], self.after[name].weight
        gram = own[name] if own is not None else sums.gram
        corrects = sums is not None and variant.share and name.rpartition(".")[2] in variant.kinds
        if corrects and not variant.scales:
            delta = target(delta, weight, sums, variant)
        budget = 8 * (self.frame.delta.matrices[f"{name}.weight"].nbytes - COUNTS_BYTES)
        packed = pack(quantize_matrix(delta, hessian(gram, self.config.damping), self.config,
                                      budget_bits=budget).delta)
        if corrects and variant.scales and packed.rank:
            return with_scales(packed, missing(weight, sums, variant), sums.gram, variant)
        return packed
