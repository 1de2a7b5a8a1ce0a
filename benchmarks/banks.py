"""Cases of delta_gemm and banks of random deltas as a real allocation has them.

Every bit pattern is a valid code, so an arena of random words is a valid bank: only the numbers
of lanes of each width, here the same in V and U, and the scales need care.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from harness import random_words
from torch import Tensor

from adamix import ops

# Share of the components at each width: as the allocation leaves real deltas at 1 bit a weight.
WIDTH_SHARES = {2: 0.30, 3: 0.45, 4: 0.12, 5: 0.06, 6: 0.04, 7: 0.02, 8: 0.01}
MEAN_BITS = sum(bits * share for bits, share in WIDTH_SHARES.items())
SCALE_BITS = 32  # one fp32 a component
ALIGNMENT = 64  # words: 256 bytes
COMPONENT_SIZE = 1e-3  # of every component, whatever its width: scale x mean square level


@dataclass(frozen=True)
class Case:
    """`models` fine-tunes with `tokens` tokens each, on one matrix or several of one input."""

    in_features: int
    outs: tuple[int, ...]  # q/k/v and gate/up have several
    models: int
    tokens: int  # a model
    dtype: torch.dtype = torch.bfloat16
    bits: float = 1.0  # a weight, scales counted
    device: str = "cuda"

    @property
    def shape(self) -> str:
        outs = "+".join(map(str, self.outs))
        return f"{self.in_features}x" + (f"({outs})" if len(self.outs) > 1 else outs)

    @property
    def out_features(self) -> int:
        return sum(self.outs)

    @property
    def rows(self) -> int:
        """Tokens of all models."""
        return self.models * self.tokens

    @property
    def packed_bytes(self) -> float:
        """Of all models: words and scales."""
        return self.models * self.in_features * self.out_features * self.bits / 8

    @property
    def activation_bytes(self) -> int:
        """x read, y read and written."""
        return self.rows * (self.in_features + 2 * self.out_features) * self.dtype.itemsize

    @property
    def stored_activation_bytes(self) -> int:
        return self.rows * (self.in_features + self.out_features) * self.dtype.itemsize

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)


def mean_rank(in_features: int, out_features: int, bits: float = 1.0) -> int:
    """Components that `bits` a weight pays for, at the mean width and with the scales."""
    weights = in_features * out_features
    return int(weights * bits / (MEAN_BITS * (in_features + out_features) + SCALE_BITS))


def draw_counts(rng: np.random.Generator, in_features: int, out_features: int,
                bits: float = 1.0) -> list[int]:
    """Rows of V, as columns of U, at each width, 8 .. 1: widths drawn by their shares until the
    budget is spent."""
    widths = np.array(list(WIDTH_SHARES))
    most = 2 * mean_rank(in_features, out_features, bits) + 100
    drawn = rng.choice(widths, size=most, p=list(WIDTH_SHARES.values()))
    cost = [32 * (ops.lane_words(in_features, b) + ops.lane_words(out_features, b)) + SCALE_BITS
            for b in range(1, ops.MAX_BITS + 1)]
    spent = np.cumsum(np.array(cost)[drawn - 1])
    rank = int(np.searchsorted(spent, in_features * out_features * bits, side="right"))
    return np.bincount(drawn[:rank], minlength=ops.MAX_BITS + 1)[:0:-1].tolist()


def lane_widths(counts: list[int]) -> np.ndarray:
    """The width of each lane, widest first."""
    return np.repeat(np.arange(ops.MAX_BITS, 0, -1), counts)


@dataclass(frozen=True)
class Slot:
    """One delta of one matrix in the arena; offsets and sizes in words."""

    in_features: int
    out_features: int
    v_counts: tuple[int, ...]
    u_counts: tuple[int, ...]
    begin: int

    @property
    def rank(self) -> int:
        return sum(self.v_counts)

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        return (ops.v_words(self.in_features, self.v_counts),
                ops.u_words(self.out_features, self.u_counts), self.rank)

    @cached_property
    def offsets(self) -> tuple[int, int, int]:
        """Of V, U and the scales, each aligned."""
        v, u, _ = (-(-size // ALIGNMENT) * ALIGNMENT for size in self.sizes)
        return self.begin, self.begin + v, self.begin + v + u

    @property
    def end(self) -> int:
        return self.offsets[2] + -(-self.sizes[2] // ALIGNMENT) * ALIGNMENT

    @property
    def table_row(self) -> list[int]:
        row = [0] * ops.TABLE_COLUMNS
        for column, offset in zip((ops.TABLE_V_OFFSET, ops.TABLE_U_OFFSET,
                                   ops.TABLE_SCALE_OFFSET), self.offsets, strict=True):
            row[column] = offset
        row[ops.TABLE_FIRST_V_COUNT : ops.TABLE_FIRST_U_COUNT] = self.v_counts
        row[ops.TABLE_FIRST_U_COUNT :] = self.u_counts
        return row

    def flops(self, tokens: int) -> int:
        return 2 * self.rank * (self.in_features + self.out_features) * tokens


@dataclass(frozen=True)
class Bank:
    """Deltas of `sets` layers that look alike, in one arena."""

    arena: Tensor  # int32
    slots: list[list[list[Slot]]]  # [sets][matrices][models]
    tables: list[list[Tensor]]  # [sets][matrices], int64 [models, TABLE_COLUMNS]

    @property
    def every(self) -> list[Slot]:
        return [slot for one in self.slots for matrix in one for slot in matrix]

    @property
    def max_rank(self) -> int:
        return max(slot.rank for slot in self.every)

    @property
    def packed_bytes(self) -> float:
        """Words and scales of a set, in the mean."""
        return 4 * sum(sum(slot.sizes) for slot in self.every) / len(self.slots)

    def flops(self, tokens: int) -> float:
        """Of a set, in the mean."""
        return sum(slot.flops(tokens) for slot in self.every) / len(self.slots)


def make_bank(case: Case, sets: int, seed: int = 0) -> Bank:
    rng = np.random.default_rng(seed)
    end = 0
    slots: list[list[list[Slot]]] = []
    for _ in range(sets):
        slots.append([[] for _ in case.outs])
        for _ in range(case.models):
            for out, matrix in zip(case.outs, slots[-1], strict=True):
                counts = tuple(draw_counts(rng, case.in_features, out, case.bits))
                matrix.append(Slot(case.in_features, out, counts, counts, end))
                end = matrix[-1].end
    arena = random_words(end, case.device)
    _write_scales(arena, [slot for one in slots for matrix in one for slot in matrix], rng)
    rows = [[[slot.table_row for slot in matrix] for matrix in one] for one in slots]
    tables = torch.tensor(rows, dtype=torch.int64).to(case.device)
    return Bank(arena, slots, [list(one.unbind()) for one in tables.unbind()])


def _write_scales(arena: Tensor, slots: list[Slot], rng: np.random.Generator) -> None:
    """Scales that give every component the same energy: an error in the lanes of one width then
    shows in the sum. Two-bit components get 2e-4, eight-bit ones 5e-8."""
    widths = np.concatenate([lane_widths(list(slot.v_counts)) for slot in slots])  # U's too
    mean_square_level = (4.0**widths - 1) / 3
    scales = COMPONENT_SIZE * rng.uniform(0.5, 1.5, widths.size) / mean_square_level
    places = np.concatenate([slot.offsets[2] + np.arange(slot.sizes[2]) for slot in slots])
    bits = torch.from_numpy(scales.astype(np.float32)).view(torch.int32)
    arena[torch.from_numpy(places).to(arena.device)] = bits.to(arena.device)


def delta_size(in_features: int, rank: int) -> float:
    """About how large an entry of a delta's output is, for inputs N(0, 1)."""
    return COMPONENT_SIZE * (in_features * rank) ** 0.5


def alone(bank: Bank, slot: Slot) -> tuple[Tensor, Tensor]:
    """(arena, table) on the CPU that hold this delta alone."""
    parts = [bank.arena[offset : offset + size].cpu()
             for offset, size in zip(slot.offsets, slot.sizes, strict=True)]
    row = slot.table_row
    row[ops.TABLE_V_OFFSET] = 0
    row[ops.TABLE_U_OFFSET] = slot.sizes[0]
    row[ops.TABLE_SCALE_OFFSET] = slot.sizes[0] + slot.sizes[1]
    return torch.cat(parts), torch.tensor([row], dtype=torch.int64)
