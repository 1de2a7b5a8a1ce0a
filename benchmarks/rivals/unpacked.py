"""The same delta in plain PyTorch: unpack by shifts, then two batched products.

A stand-in for the packed layout that is kind to this rival: codes lie in simple order, 32 // bits
of them a word, none across two words; all models have the same number of components of each width,
so that everything is batched. It is eager or, where that is faster, compiled by torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from banks import WIDTH_SHARES, Case, mean_rank
from harness import Prepared, Work, random_words
from torch import Tensor

Unpack = Callable[[Tensor, Tensor, int, Tensor], None]


def unpack_levels(words: Tensor, shifts: Tensor, bits: int, out: Tensor) -> None:
    """Levels 2q − (2^b − 1) of words int32 [..., words] into out [..., codes]."""
    top = 2**bits - 1
    levels = (words.unsqueeze(-1) >> shifts & top) * 2 - top
    out.copy_(levels.flatten(-2)[..., : out.shape[-1]])


def width_counts(rank: int) -> dict[int, int]:
    """Components of each width, wide first; the rest goes to the most frequent width."""
    counts = {bits: round(rank * share) for bits, share in sorted(WIDTH_SHARES.items())[::-1]}
    counts[3] += rank - sum(counts.values())
    return counts


class Factor:
    """V or U of all models: lanes of `codes` codes, by width, and where they are unpacked to."""

    def __init__(self, case: Case, counts: dict[int, int], codes: int, levels: Tensor) -> None:
        self.parts = []
        first = 0
        for bits, count in counts.items():
            words = random_words(case.models * count * word_count(codes, bits), case.device)
            shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32,
                                  device=case.device)
            self.parts.append((words.view(case.models, count, -1), shifts, bits,
                               levels[:, first : first + count]))
            first += count
        self.levels = levels

    def unpack(self, unpack: Unpack) -> Tensor:
        for words, shifts, bits, out in self.parts:
            unpack(words, shifts, bits, out)
        return self.levels


def word_count(codes: int, bits: int) -> int:
    return -(-codes // (32 // bits))


def unpacked(case: Case) -> Work:
    counts = width_counts(mean_rank(case.in_features, case.out_features, case.bits))
    rank = sum(counts.values())
    words = sum(count * (word_count(case.in_features, bits) + word_count(case.out_features, bits))
                for bits, count in counts.items())
    packed = case.models * 4 * (words + rank)

    def call(unpack: Unpack, y: Tensor, x: Tensor, V: Factor, U: Factor, scales: Tensor) -> None:
        z = torch.bmm(x, V.unpack(unpack).mT).mul_(scales)
        y.baddbmm_(z, U.unpack(unpack))

    def build(sets: int) -> Prepared:
        torch._dynamo.config.recompile_limit = 1000  # a kernel for every width and shape
        unpacks: dict[str, Unpack] = {
            "compiled": torch.compile(unpack_levels, dynamic=False), "eager": unpack_levels}
        paths: dict[str, list[partial[None]]] = {path: [] for path in unpacks}
        V_levels = case.random(case.models, rank, case.in_features)
        U_levels = case.random(case.models, rank, case.out_features)
        for _ in range(sets):
            x = case.random(case.models, case.tokens, case.in_features)
            y = case.random(case.models, case.tokens, case.out_features)
            V = Factor(case, counts, case.in_features, V_levels)
            U = Factor(case, counts, case.out_features, U_levels)
            scales = case.random(case.models, 1, rank).mul_(1e-4)
            for path, unpack in unpacks.items():
                paths[path].append(partial(call, unpack, y, x, V, U, scales))
        flops = 2 * case.rows * rank * (case.in_features + case.out_features)
        return Prepared(paths, packed + case.activation_bytes, flops)

    return Work(packed + case.stored_activation_bytes, build)
