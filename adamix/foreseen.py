"""A compression that is not done yet: what is known of it from headers and configs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from adamix import ops
from adamix.artifacts import Manifest
from adamix.budget import Budget
from adamix.compression.matrix import component_bits
from adamix.config import Config
from adamix.costs import planned_bits, planned_rank
from adamix.devices import Compute
from adamix.memory import Sizes, sizes
from adamix.naming import group_by_kind
from adamix.source.architecture import Architecture
from adamix.source.checkpoints import Checkpoint
from adamix.source.targets import Survey, Target, Treatment
from adamix.storage.file import file_bytes, manifest_text


@dataclass(frozen=True)
class Foreseen:
    """A compression, every tensor of whose fine-tune differs."""

    sources: tuple[Checkpoint, Checkpoint]
    found: Survey
    architecture: Architecture
    config: Config
    budget: Budget
    tokens: tuple[int, int]
    samples: bool  # the model writes the calibration text itself
    threads: int
    compute: Compute
    limit: int | None  # on the process's memory
    model: PreTrainedModel  # on the meta device
    groups: list[list[Target]]  # the matrices that read one input each

    @property
    def matrices(self) -> list[Target]:
        return [target for group in self.groups for target in group]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self.sources[1].headers.items()}

    def sizes(self) -> Sizes:
        """What calibrating handles."""
        asked = [t.shape for t in self.matrices if self.is_calibrated(t)]
        return sizes(self.shapes, asked, self.architecture.hidden, self.tokens, whole=False,
                     experts=self.architecture.experts)

    def is_calibrated(self, target: Target) -> bool:
        """An embedding's inputs are one-hot, unless it is the head too."""
        return target.treatment is Treatment.LINEAR or self.architecture.tied

    def written(self, manifest: Manifest) -> int:
        """Bytes of `delta.safetensors` and `delta_config.json`."""
        matrices = {t.name: t for t in self.matrices}
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for kind, names in group_by_kind({name: t.shape for name, t in matrices.items()}).items():
            args = [(matrices[name].shape, self.planned_bits(matrices[name]), self.config)
                    for name in names]
            rank = sum(planned_rank(*arg) for arg in args)
            words = sum(planned_bits(*arg) for arg in args) // 32 - rank
            tensors |= {f"{kind}.words": (torch.int32, (words,)),
                        f"{kind}.scales": (torch.float32, (rank,)),
                        f"{kind}.counts": (torch.int32, (len(names), 2 * ops.MAX_BITS))}
        whole = {t.name: (t.shape, t.dtype) for t in self.found.of(Treatment.WHOLE)}
        for kind, names in group_by_kind(whole).items():
            shape, dtype = whole[names[0]]
            tensors[f"whole:{kind}"] = dtype, (len(names), *shape)
        for t in self.found.targets:
            if t.extra_rows:
                tensors[f"rows:{t.name}"] = t.dtype, (t.extra_rows, *t.shape[1:])
        return file_bytes(tensors) + len(manifest_text(manifest).encode())

    def planned_bits(self, target: Target) -> int:
        """The bits of a matrix; of one budget for all, what an even share of it would be."""
        bits, shape = self.budget.bits[target.name], target.shape
        spared = component_bits(shape, 2) - component_bits(shape, 1)
        return bits if self.config.allocate == "matrix" else bits - spared

    @property
    def readers(self) -> int:
        """Tensors of both models that are read at a time."""
        return self.threads if self.threads > 2 and self.limit is None else 1

    def pairs(self) -> dict[str, int]:
        """Bytes of both sides of each tensor of the fine-tune, and of what they are compared as."""
        base, finetuned = (source.headers for source in self.sources)
        pairs = {}
        for name, (shape, dtype) in finetuned.items():
            other = base[name][1] if name in base else dtype
            sides = dtype.itemsize + other.itemsize
            pairs[name] = math.prod(shape) * sides * (1 if other == dtype else 2)
        return pairs
