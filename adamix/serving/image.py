"""A fine-tune as the bank copies it to the device: one run of words, and a row of each table."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from adamix import ops
from adamix.artifacts import ModelDelta, PackedDelta
from adamix.errors import BankError
from adamix.serving.arena import aligned


@dataclass(frozen=True)
class MatrixPlace:
    """A weight that deltas may change: its row in the bank's tables."""

    index: int
    shape: tuple[int, int]
    max_rank: int


@dataclass(frozen=True)
class ValuesPlace:
    """A parameter that deltas may change whole: its columns in the bank's values."""

    begin: int
    end: int
    dtype: torch.dtype  # of the bank's values
    base: Tensor  # the base's values, fp32
    is_added: bool  # a linear layer's bias, a router: kept as difference, the base adds its own


@dataclass(frozen=True)
class Places:
    """All that a model's deltas may change."""

    matrices: dict[str, MatrixPlace]
    values: dict[str, ValuesPlace]
    columns: dict[torch.dtype, int]  # of values of each dtype
    aliases: dict[str, str] = field(default_factory=dict)  # a checkpoint's name -> the model's

    def matrix(self, name: str) -> MatrixPlace | None:
        """That of a weight by either name."""
        return self.matrices.get(name) or self.matrices.get(self.aliases.get(name, ""))

    def value(self, name: str) -> ValuesPlace | None:
        """That of a parameter by either name."""
        return self.values.get(name) or self.values.get(self.aliases.get(name, ""))


@dataclass(frozen=True)
class DeltaImage:
    """On the host, in memory that the device can copy from while the host goes on."""

    words: Tensor  # int32, every matrix's V words, U words and scales, each aligned
    table: Tensor  # int64 [matrices, TABLE_COLUMNS], offsets from the first word
    values: dict[torch.dtype, Tensor]  # [columns] each

    @property
    def nbytes(self) -> int:
        """Of the host's memory."""
        return sum(t.nbytes for t in (self.words, self.table, *self.values.values()))


def base_values(places: Places, *, pin: bool = False) -> dict[torch.dtype, Tensor]:
    """What a row of the base adds or has, `[columns]` of each dtype."""
    values = {dtype: torch.zeros(count, dtype=dtype, pin_memory=pin)
              for dtype, count in places.columns.items()}
    for place in places.values.values():
        if not place.is_added:
            values[place.dtype][place.begin : place.end] = place.base
    return values


def words_of(delta: ModelDelta) -> int:
    """Words of the arena that a delta takes."""
    return sum(aligned(length) for packed in delta.matrices.values() for length in _lengths(packed))


def make_image(name: str, delta: ModelDelta, places: Places, *, pin: bool) -> DeltaImage:
    """Lay a delta out for the device.

    Args:
        name: the fine-tune's, for what is raised.
        pin: page-locked memory, for asynchronous copies to a GPU.

    Raises:
        BankError: it changes what no row can have of its own, or has more components than fit.
    """
    _refuse_unroutable(name, delta, places)
    words = torch.zeros(words_of(delta), dtype=torch.int32, pin_memory=pin)
    table = torch.zeros(len(places.matrices), ops.TABLE_COLUMNS, dtype=torch.int64, pin_memory=pin)
    columns = (ops.TABLE_V_OFFSET, ops.TABLE_U_OFFSET, ops.TABLE_SCALE_OFFSET)
    end = 0
    for matrix, packed in delta.matrices.items():
        row = table[places.matrix(matrix).index]
        row[ops.TABLE_FIRST_V_COUNT : ops.TABLE_FIRST_U_COUNT] = torch.tensor(packed.v_counts)
        row[ops.TABLE_FIRST_U_COUNT :] = torch.tensor(packed.u_counts)
        v_words = _lengths(packed)[0]
        parts = (packed.words[:v_words], packed.words[v_words:], packed.scales.view(torch.int32))
        for column, part in zip(columns, parts, strict=True):
            row[column] = end
            words[end : end + part.numel()] = part
            end += aligned(part.numel())
    values = base_values(places, pin=pin)
    for parameter, tensor in delta.whole.items():
        place = places.value(parameter)
        own = tensor.float() - place.base if place.is_added else tensor
        values[place.dtype][place.begin : place.end] = own.flatten()
    return DeltaImage(words, table, values)


def _lengths(packed: PackedDelta) -> tuple[int, int, int]:
    v_words = ops.v_words(packed.shape[1], packed.v_counts)
    return v_words, packed.words.numel() - v_words, packed.rank


def _refuse_unroutable(name: str, delta: ModelDelta, places: Places) -> None:
    for matrix, packed in delta.matrices.items():
        place = places.matrix(matrix)
        _check_shape(name, matrix, packed.shape, place.shape if place else None)
        if place and packed.rank > place.max_rank:
            raise BankError(f"{name} has {packed.rank} components in {matrix}, the bank takes at "
                            f"most {place.max_rank} there: give a larger max_rank")
    for parameter, tensor in delta.whole.items():
        known = places.value(parameter)
        if known is None and tensor.dim() == 1 and places.matrix(parameter) is None:
            raise BankError(f"{name} changes {parameter}, which the model does not have or cannot "
                            f"have for each row: merge it instead")
        if known is None:
            raise BankError(f"{name} keeps {parameter} {list(tensor.shape)} whole, and a matrix "
                            f"that is not compressed cannot be routed: merge it instead")
        _check_shape(name, parameter, tuple(tensor.shape), tuple(known.base.shape))
    if delta.extra_rows:
        grown = next(iter(delta.extra_rows))
        raise BankError(f"{name} has {delta.extra_rows[grown].shape[0]} rows of {grown} that the "
                        f"base lacks, and a vocabulary cannot be routed: merge it instead")


def _check_shape(name: str, parameter: str, found: tuple[int, ...],
                 expected: tuple[int, ...] | None) -> None:
    if expected is None:
        raise BankError(f"{name} changes {parameter}, which is no linear layer of this model, nor "
                        f"its embedding: merge it instead, if it is a fine-tune of this model")
    if found != expected:
        raise BankError(f"{name} has a {parameter} of {list(found)}, the model one of "
                        f"{list(expected)}")
