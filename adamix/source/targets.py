"""Two checkpoints -> what becomes of each tensor: one table (the order of the rows decides).

    tensor                                               treatment
    ---------------------------------------------------  -----------------------------------------
    the head of a model that ties it to its embedding    TIED: the embedding's
    equal to the base                                    EQUAL: nothing stored
    weight of a linear layer, the output head included   LINEAR: compressed
    input embedding                                      EMBEDDING: compressed, rows by frequency
    norms, biases, anything else, what the user wants    WHOLE: the fine-tune's own values

A vocabulary that grew: the shared rows as above, the rows beyond them whole. A tensor
`[experts, .., ..]` of linear layers: each expert's slice by itself, unless all are equal. Conv1D's
weights, and some experts', are stored `[in, out]`; their deltas are `[out, in]` as all others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain

import torch
from torch import Tensor

from adamix.artifacts import SMALL, WeightPair
from adamix.errors import MismatchError, NonFiniteError
from adamix.parallel import in_order
from adamix.source.architecture import Architecture
from adamix.source.checkpoints import Checkpoint, Fingerprint, TensorDigest, digest


class Treatment(Enum):
    TIED = "tied"
    EQUAL = "equal"
    LINEAR = "linear"
    EMBEDDING = "embedding"
    WHOLE = "whole"

BASE, FINETUNED, COMPARED = PARTS = "base", "fine-tune", "both"  # what is looked at of a tensor
ROUND = 1024  # tensors between two gatherings: their digests take up to 128 KiB each


@dataclass(frozen=True)
class Target:
    """One tensor of the fine-tune and what becomes of it."""

    name: str
    treatment: Treatment
    shape: tuple[int, ...]  # of the part that both checkpoints have
    dtype: torch.dtype
    extra_rows: int = 0  # rows beyond the base's vocabulary
    transposed: bool = False  # stored [in, out], while `shape` is [out, in]
    stack: str | None = None  # the tensor [experts, ..] that holds it; the name ends in its index

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """It, as stored."""
        if self.stack is None:
            return checkpoint.read(self.name)
        return checkpoint.read_slice(self.stack, int(self.name.rpartition(".")[2]))

    @property
    def numel(self) -> int:
        """Of the part that both checkpoints have."""
        return math.prod(self.shape)

    @property
    def extra_numel(self) -> int:
        """Of the rows beyond the base's vocabulary."""
        return self.extra_rows * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Survey:
    """The outcome of reading both checkpoints once."""

    targets: list[Target]
    fingerprint: dict[str, str]  # of the base
    finetuned_fingerprint: dict[str, str]
    absent: list[str]  # tensors of the base that the fine-tune lacks

    def of(self, *treatments: Treatment) -> list[Target]:
        """The targets with one of these treatments."""
        return [target for target in self.targets if target.treatment in treatments]


Look = tuple[list[TensorDigest | None], list[Target]]  # of one tensor: of both sides, what it is


def check_pair(base: Checkpoint, finetuned: Checkpoint, architecture: Architecture) -> None:
    """Refuse two checkpoints that are not a base and its fine-tune; reads headers only.

    Raises:
        MismatchError: architecture, shapes, dtypes or vocabularies disagree.
    """
    for key in ("model_type", "architectures"):
        ours, theirs = base.config.get(key), finetuned.config.get(key)
        if ours != theirs:
            raise MismatchError(f"base and fine-tune differ in {key}: {ours} and {theirs}")
    vocabulary = {architecture.embedding, architecture.head}
    for name, (shape, dtype) in finetuned.headers.items():
        if name not in base:
            continue
        base_shape, base_dtype = base.headers[name]
        if base_dtype.is_floating_point != dtype.is_floating_point:
            raise MismatchError(f"{name} is {base_dtype} in the base and {dtype} in the fine-tune")
        grown = name in vocabulary and shape[1:] == base_shape[1:] and shape[0] > base_shape[0]
        if shape != base_shape and not grown:
            raise MismatchError(
                f"{name} is {list(base_shape)} in the base and {list(shape)} in the fine-tune: "
                f"shapes must agree (a vocabulary may only grow)")
    if not any(name in base for name in finetuned.names):
        raise MismatchError(f"no tensor of {finetuned.source} has a name of {base.source}")
    missing = [name for name in sorted(architecture.linears) if name not in finetuned
               and name.rpartition(".")[0] not in architecture.stacks
               and not (name == architecture.head and architecture.tied)]
    if missing:
        raise MismatchError(
            f"the fine-tune's config asks for {missing[0]}, which its checkpoint lacks or has "
            f"under another name, as some older architectures do: those are not supported yet")
    _check_vocabularies(base, finetuned)


def _check_vocabularies(base: Checkpoint, finetuned: Checkpoint) -> None:
    ours, theirs = _vocabulary(base), _vocabulary(finetuned)
    for token, number in ours.items():
        if token in theirs and theirs[token] != number:
            raise MismatchError(f"the vocabularies differ: token {token!r} is {number} in the base "
                                f"and {theirs[token]} in the fine-tune")
    if ours and theirs and not ours.keys() & theirs.keys():
        raise MismatchError("the vocabularies differ: they share no token")


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    """{token: id} of `tokenizer.json`, special tokens included; empty where there is none."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.exists():
        return {}
    try:
        body = json.loads(path.read_text())
        vocabulary = body["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of their ids
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in body.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MismatchError(f"{path} is no tokenizer file: {error}") from error
    return {**vocabulary, **added}


def read_pair(base: Checkpoint, finetuned: Checkpoint, target: Target) -> WeightPair:
    """Both sides of a target, `[out, in]` where it is a linear layer's; the fine-tune's without the
    rows that the base lacks."""
    sides = target.read(base), target.read(finetuned)
    if target.extra_rows:
        sides = sides[0], sides[1][: target.shape[0]]
    if target.transposed:
        sides = sides[0].T, sides[1].T
    return WeightPair(target.name, *sides)


def survey(base: Checkpoint, finetuned: Checkpoint, architecture: Architecture, *,
           compress_embeddings: bool = True, compress_vision: bool = True,
           executor: Executor | None = None,
           on_tensor: Callable[[str], None] = lambda name: None,
           mine: Callable[[list[int]], list[int]] = lambda sizes: list(range(len(sizes))),
           gather: Callable[[dict[str, Look]], list[dict[str, Look]]] = lambda found: [found]
           ) -> Survey:
    """Read every tensor of both once: compare, look for NaN and Inf, hash, decide.

    Args:
        mine: which of tensors of so many bytes this process looks at, by number.
        gather: what all processes have found.
        executor: works on tensors, and on the parts of one, side by side; None: one by one.
        compress_embeddings: False keeps the embedding and the head whole.
        compress_vision: False keeps whole what is outside of the language model.
        on_tensor: called with each name when it is done.

    Raises:
        NonFiniteError: a weight is NaN or Inf.
    """
    whole = _kept_whole(architecture, compress_embeddings, compress_vision)
    names = sorted({*base.names, *finetuned.names})
    fingerprints, targets = (Fingerprint(), Fingerprint()), []

    def read(name: str) -> list[Tensor | None]:
        return [source.read(name) if name in source else None for source in (base, finetuned)]

    def one_by_one(name: str) -> list[object]:
        sides = read(name)
        return [_look(name, part, *sides, architecture, whole) for part in PARTS]

    def by_itself(one: tuple[str, str]) -> object:
        return _look(*one, *read(one[0]), architecture, whole)

    for start in range(0, len(names), ROUND):
        some = names[start : start + ROUND]
        ours = [some[i] for i in mine([_bytes_of(name, base, finetuned) for name in some])]
        parts = [(name, part) for name in ours for part in PARTS]
        looks = (chain.from_iterable(map(one_by_one, ours)) if executor is None else
                 in_order(executor, by_itself, parts, len(parts)))
        looked: dict[str, Look] = {}
        for name in ours:
            looked[name] = [next(looks), next(looks)], next(looks)
            on_tensor(name)
        found = {name: one for part in gather(looked) for name, one in part.items()}
        for name in some:
            for fingerprint, one in zip(fingerprints, found[name][0], strict=True):
                if one is not None:
                    fingerprint.take(one)
            targets += found[name][1]
        for name in sorted(found.keys() - looked.keys()):
            on_tensor(name)
    absent = [name for name in base.names if name not in finetuned]
    return Survey(targets, *(fingerprint.result() for fingerprint in fingerprints), absent)


def _look(name: str, part: str, base: Tensor | None, tensor: Tensor | None,
          architecture: Architecture, whole: Collection[str]
          ) -> TensorDigest | list[Target] | None:
    """What is found of one of PARTS of a tensor."""
    if part == COMPARED:
        return [] if tensor is None else _decide(name, base, tensor, architecture, whole)
    values = base if part == BASE else tensor
    if values is None:
        return None
    if tensor is not None:
        _check_finite(name, part, values)
    return digest(name, values)


def _bytes_of(name: str, *sources: Checkpoint) -> int:
    shapes = [source.headers[name] for source in sources if name in source]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def _check_finite(name: str, side: str, values: Tensor) -> None:
    if not values.is_floating_point() or not values.numel():
        return
    least, most = values.aminmax()  # both NaN where any is; no array is made of it
    if not (least.isfinite() and most.isfinite()):
        raise NonFiniteError(f"{name} of the {side} holds NaN or Inf")


def presumed_survey(base: Checkpoint, finetuned: Checkpoint, architecture: Architecture, *,
                    compress_embeddings: bool = True, compress_vision: bool = True) -> Survey:
    """What `survey` finds where every tensor of the fine-tune differs; reads headers only."""
    whole = _kept_whole(architecture, compress_embeddings, compress_vision)
    targets = []
    for name in finetuned.names:
        shape, dtype = finetuned.headers[name]
        base_shape = base.headers[name][0] if name in base else None
        targets += _treat(name, base_shape, shape, dtype, architecture, whole)
    absent = [name for name in base.names if name not in finetuned]
    unknown = {"sha256": "0" * 64, "sampled": "0" * 64}
    return Survey(targets, unknown, unknown, absent)


def _kept_whole(architecture: Architecture, compress_embeddings: bool, compress_vision: bool
                ) -> set[str]:
    vocabulary = {architecture.embedding or "", architecture.head or ""}
    return ((set() if compress_embeddings else vocabulary)
            | (set() if compress_vision else set(architecture.outside)))


def _decide(name: str, base: Tensor | None, tensor: Tensor, architecture: Architecture,
            whole: Collection[str]) -> list[Target]:
    """The target that a tensor is, or those that its experts are."""
    targets = _treat(name, None if base is None else tuple(base.shape), tuple(tensor.shape),
                     tensor.dtype, architecture, whole)
    if base is None or targets[0].treatment is Treatment.TIED:
        return targets
    extra_rows = tensor.shape[0] - base.shape[0] if tensor.dim() else 0
    if _equal(base, tensor[: base.shape[0]] if extra_rows else tensor):
        return [Target(name, Treatment.EQUAL, tuple(base.shape), tensor.dtype, extra_rows)]
    if targets[0].stack is None:
        return targets
    return [replace(target, treatment=Treatment.EQUAL) if _equal(*pair) else target
            for target, *pair in zip(targets, base, tensor, strict=True)]


def _equal(base: Tensor, tensor: Tensor) -> bool:
    return torch.equal(tensor, base.to(tensor.dtype)) and torch.equal(tensor.to(base.dtype), base)


def _treat(name: str, base: tuple[int, ...] | None, shape: tuple[int, ...], dtype: torch.dtype,
           architecture: Architecture, whole: Collection[str]) -> list[Target]:
    """The row of the table for a tensor that differs, or for each of its experts, by its shapes in
    the base (None: it is not there) and in the fine-tune."""
    if (base is not None and name in architecture.stacks and name not in whole
            and dtype.is_floating_point and min(shape[1:]) >= SMALL):
        parts = [_treat_one(f"{name}.{i}", base[1:], shape[1:], dtype, architecture, whole)
                 for i in range(shape[0])]
        return [replace(part, stack=name) for part in parts]
    return [_treat_one(name, base, shape, dtype, architecture, whole)]


def _treat_one(name: str, base: tuple[int, ...] | None, shape: tuple[int, ...],
               dtype: torch.dtype, architecture: Architecture, whole: Collection[str]) -> Target:
    if architecture.tied and name == architecture.head:
        return Target(name, Treatment.TIED, shape, dtype)
    small = base is None or len(base) != 2 or min(base) < SMALL
    if small or name in whole or not dtype.is_floating_point:
        treatment = Treatment.WHOLE
    elif name in architecture.linears:
        treatment = Treatment.LINEAR
    elif name == architecture.embedding:
        treatment = Treatment.EMBEDDING
    else:
        treatment = Treatment.WHOLE
    if treatment is Treatment.WHOLE:
        return Target(name, treatment, shape, dtype)
    transposed = treatment is Treatment.LINEAR and name in architecture.transposed
    return Target(name, treatment, base[::-1] if transposed else base, dtype, shape[0] - base[0],
                  transposed)
