"""Rivals out of cuBLAS: full weights a model, 16-bit low rank of the same bytes, the base alone.

Each is tried with its operands in both layouts, outputs and operands contiguous; the faster is
kept: "[out, in]" is how checkpoints hold a weight (cuBLAS' TN), "[in, out]" its transpose (NN).
"""

from __future__ import annotations

from functools import partial

import torch
from banks import Case
from harness import Prepared, Work
from torch import Tensor

RANK_MULTIPLE = 8  # 16 bytes: what cuBLAS' aligned kernels ask of a row


def naive(case: Case) -> Work:
    """torch.bmm of every model's whole weight [models, tokens, in] x [models, in, out]."""
    shape = (case.models, case.in_features, case.out_features)
    weight_bytes = case.models * case.in_features * case.out_features * case.dtype.itemsize

    def build(sets: int) -> Prepared:
        paths: dict[str, list[partial[Tensor]]] = {"bmm [out, in]": [], "bmm [in, out]": []}
        for _ in range(sets):
            x = case.random(case.models, case.tokens, case.in_features)
            y = case.random(case.models, case.tokens, case.out_features)
            weight = random_matrices(case, *shape)
            for path, calls in zip(paths, paths.values(), strict=True):
                calls.append(partial(torch.bmm, x, oriented(weight, path), out=y))
        moved = weight_bytes + case.rows * (shape[1] + shape[2]) * case.dtype.itemsize
        return Prepared(paths, moved, 2 * case.rows * shape[1] * shape[2])

    return Work(weight_bytes + case.stored_activation_bytes, build)


def low_rank_rank(case: Case) -> int:
    """Components in 16 bits that take the packed delta's bytes, rounded down to aligned rows."""
    per_component = (case.in_features + case.out_features) * case.dtype.itemsize
    rank = int(case.packed_bytes / case.models / per_component)
    return max(RANK_MULTIPLE, rank // RANK_MULTIPLE * RANK_MULTIPLE)


def low_rank(case: Case) -> Work:
    """y += (x A) B, two batched products; A [models, in, rank], B [models, rank, out]."""
    rank = low_rank_rank(case)
    ends = case.in_features + case.out_features
    factor_bytes = case.models * rank * ends * case.dtype.itemsize

    def call(y: Tensor, x: Tensor, down: Tensor, up: Tensor, z: Tensor) -> None:
        torch.bmm(x, down, out=z)
        y.baddbmm_(z, up)

    def build(sets: int) -> Prepared:
        paths: dict[str, list[partial[None]]] = {
            "bmm, baddbmm [out, in]": [], "bmm, baddbmm [in, out]": []}
        z = case.random(case.models, case.tokens, rank)
        for _ in range(sets):
            x = case.random(case.models, case.tokens, case.in_features)
            y = case.random(case.models, case.tokens, case.out_features)
            down = random_matrices(case, case.models, case.in_features, rank)
            up = random_matrices(case, case.models, rank, case.out_features)
            for path, calls in zip(paths, paths.values(), strict=True):
                calls.append(partial(call, y, x, oriented(down, path), oriented(up, path), z))
        return Prepared(paths, factor_bytes + case.activation_bytes, 2 * case.rows * rank * ends)

    return Work(factor_bytes + case.stored_activation_bytes, build)


def base_gemm(case: Case) -> Work:
    """x Wᵀ for all tokens with the one base weight: what delta_gemm comes on top of."""
    shape = (1, case.in_features, case.out_features)
    weight_bytes = case.in_features * case.out_features * case.dtype.itemsize

    def build(sets: int) -> Prepared:
        paths: dict[str, list[partial[Tensor]]] = {"mm [out, in]": [], "mm [in, out]": []}
        for _ in range(sets):
            x = case.random(case.rows, case.in_features)
            y = case.random(case.rows, case.out_features)
            weight = random_matrices(case, *shape)
            for path, calls in zip(paths, paths.values(), strict=True):
                calls.append(partial(torch.mm, x, oriented(weight, path)[0], out=y))
        moved = weight_bytes + case.rows * (shape[1] + shape[2]) * case.dtype.itemsize
        return Prepared(paths, moved, 2 * case.rows * shape[1] * shape[2])

    return Work(weight_bytes + case.stored_activation_bytes, build)


def random_matrices(case: Case, models: int, rows: int, columns: int) -> Tensor:
    """[models, rows, columns], contiguous; entries as small as a weight's."""
    return case.random(models, rows, columns).mul_(0.02)


def oriented(matrices: Tensor, path: str) -> Tensor:
    """The same memory as [models, rows, columns] or as the transpose of [models, columns, rows].

    The numbers are random: the two paths compute different products of one size.
    """
    models, rows, columns = matrices.shape
    return matrices.view(models, columns, rows).mT if "[out, in]" in path else matrices
