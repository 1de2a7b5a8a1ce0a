"""The method's mathematics in float64, from the paper and from first principles.

Plain and slow on purpose, and independent: nothing here imports adamix. Arguments may be torch
tensors or numpy arrays; results are numpy float64. Inputs are the columns of X `[in, tokens]`.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def array(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64).copy()  # what comes in is never overwritten


# --- synthetic layers --------------------------------------------------------------------------


def orthonormal(rng: np.random.Generator, n: int, columns: int) -> Array:
    return np.linalg.qr(rng.standard_normal((n, columns)))[0]


def layer_inputs(rng: np.random.Generator, n: int, tokens: int, decay: float = 0.5) -> Array:
    """X `[n, tokens]`: Gaussian tokens whose k-th principal direction has deviation k^-decay, the
    directions mixed over all channels; decay 0 is isotropic."""
    spread = np.arange(1, n + 1) ** -decay
    return orthonormal(rng, n, n) @ (spread[:, None] * rng.standard_normal((n, tokens)))


def layer_delta(rng: np.random.Generator, out: int, n: int, decay: float = 0.7,
                rank: int | None = None) -> Array:
    """ΔW `[out, n]` with singular values k^-decay, of the given rank."""
    rank = min(out, n) if rank is None else rank
    s = np.arange(1, rank + 1) ** -decay
    return (orthonormal(rng, out, rank) * s) @ orthonormal(rng, n, rank).T


# --- errors under the inputs -------------------------------------------------------------------


def damped_inputs(X: ArrayLike, damping: float) -> Array:
    """Inputs X' with X' X'ᵀ = X Xᵀ / m + damping · I, m the mean diagonal of X Xᵀ: the damping as
    what it stands for, `in` further tokens, each of one channel alone."""
    X = array(X)
    mean_diagonal = (X**2).sum() / X.shape[0]
    return np.hstack([X / np.sqrt(mean_diagonal), np.sqrt(damping) * np.eye(X.shape[0])])


def output_error(delta: ArrayLike, approximation: ArrayLike, X: ArrayLike,
                 row_weights: ArrayLike | None = None) -> float:
    """‖D^½ (ΔW − Δ̂) X‖² / ‖D^½ ΔW X‖²."""
    wanted, lost = array(delta) @ array(X), (array(delta) - array(approximation)) @ array(X)
    D = np.ones(wanted.shape[0]) if row_weights is None else array(row_weights)
    return (D @ lost**2).sum() / (D @ wanted**2).sum()


# --- rounding ----------------------------------------------------------------------------------


def levels(bits: int) -> Array:
    """What the codes 0 .. 2^b − 1 stand for, in units of the scale: no zero, no zero point."""
    return array([2 * code - (2**bits - 1) for code in range(2**bits)])


def nearest_code(value: float, scale: float, bits: int) -> int:
    """By trying every code; of two equally near ones the upper."""
    distances = np.abs(value - scale * levels(bits))
    return 2**bits - 1 - int(np.argmin(distances[::-1]))


def rounding_error(lane: ArrayLike, scale: float, bits: int, weights: ArrayLike | None = None
                   ) -> float:
    """The (weighted) squared error of a lane rounded to the nearest of scale · levels."""
    lane, grid = array(lane), scale * levels(bits)
    upper = np.searchsorted(grid, lane).clip(1, len(grid) - 1)
    squared = np.minimum((lane - grid[upper - 1]) ** 2, (lane - grid[upper]) ** 2)
    return squared.sum() if weights is None else array(weights) @ squared


def least_rounding_error(lane: ArrayLike, bits: int, weights: ArrayLike | None = None,
                         points: int = 2000) -> float:
    """The least error over a dense grid of scales, down to 1e-3 of the one that clips nothing."""
    widest = np.abs(array(lane)).max() / (2**bits - 1)
    grid = widest * np.append(np.geomspace(1e-3, 1.2, points), 1.0)
    return min(rounding_error(lane, scale, bits, weights) for scale in grid)


def gaussian_rounding_loss(bits: int) -> float:
    """The share of its energy that a Gaussian variable loses at the best scale, by integration."""
    z = np.linspace(-8.0, 8.0, 4001)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    return least_rounding_error(z, bits, density, points=600)


def quantize_in_order(weight: ArrayLike, H: ArrayLike, bits: ArrayLike, scales: ArrayLike, *,
                      by_row: bool) -> NDArray[np.int64]:
    """Optimal Brain Quantization in the columns' order, the definition that GPTQ computes fast.

    Each column in turn is rounded to its nearest code; then the columns not yet rounded take the
    values that are best, under e H eᵀ, for the errors made so far: e_F = −H_FF⁻¹ H_FQ e_Q, solved
    from scratch every time. bits and scales: one for each row, or one for each column.
    """
    weight, H, scales = array(weight), array(H), array(scales)
    rows, columns = weight.shape
    codes = np.zeros((rows, columns), dtype=np.int64)
    for i in range(rows):
        errors: list[float] = []  # e_Q of this row
        for j in range(columns):
            target = weight[i, j]
            if j > 0:
                target += np.linalg.solve(H[j:, j:], H[j:, :j] @ array(errors))[0]
            lane = i if by_row else j
            b, scale = int(np.asarray(bits)[lane]), scales[lane]
            codes[i, j] = nearest_code(target, scale, b)
            errors.append(weight[i, j] - scale * levels(b)[codes[i, j]])
    return codes


# --- an embedding's delta ----------------------------------------------------------------------


def embedding_rows(tokens: list[int], U: ArrayLike, scales: ArrayLike, V: ArrayLike) -> Array:
    """Row tokens[t] of U · diag(scales) · V, one sum of components a token; zeros where U `[vocab,
    rank]` has no such row."""
    U, scales, V = array(U), array(scales), array(V)
    rows = np.zeros((len(tokens), V.shape[1]))
    for t, token in enumerate(tokens):
        if 0 <= token < U.shape[0]:
            rows[t] = sum((U[token, k] * scales[k] * V[k] for k in range(len(scales))), rows[t])
    return rows


# --- packing, bit by bit from the comment of packed_layout.h ------------------------------------


def packed_block(codes: list[int], bits: int) -> list[int]:
    """32 codes -> b words. Code i of every field of four is in byte 0, 2, 1, 3 of the words; there
    stand 8 // b whole codes and, above them, bits of the fields that are left over."""
    def lowest_first(some: list[int]) -> str:
        return "".join(f"{code:0{bits}b}"[::-1] for code in some)

    whole, words = 8 // bits, [0] * bits
    for i, byte in enumerate((0, 2, 1, 3)):
        fields = codes[i::4]
        rest, share = lowest_first(fields[whole * bits:]), 8 % bits
        for word in range(bits):
            own = lowest_first(fields[word * whole:(word + 1) * whole])
            own += rest[word * share:(word + 1) * share]
            words[word] |= int(own[::-1], 2) << 8 * byte
    return words


def packed_lane(codes: list[int], bits: int) -> list[int]:
    """Block after block, the last one padded with code 0."""
    padded = codes + [0] * (-len(codes) % 32)
    return [word for first in range(0, len(padded), 32)
            for word in packed_block(padded[first:first + 32], bits)]


def packed_factor(lanes: list[list[int]], bits: list[int]) -> list[int]:
    """Panels of 256 codes of every lane; lanes by width descending."""
    return [word for first in range(0, len(lanes[0]), 256)
            for codes, b in zip(lanes, bits, strict=True)
            for word in packed_lane(codes[first:first + 256], b)]


# --- decomposition and correction --------------------------------------------------------------


def svd(matrix: ArrayLike) -> tuple[Array, Array, Array]:
    """U `[out, r]`, s `[r]` descending, V `[r, in]`."""
    return np.linalg.svd(array(matrix), full_matrices=False)


def corrected_U(delta: ArrayLike, A: ArrayLike, X: ArrayLike) -> Array:
    """argmin_U ‖ΔW X − U A X‖² on the inputs themselves: no Hessian, no normal equations."""
    X = array(X)
    return np.linalg.lstsq((array(A) @ X).T, (array(delta) @ X).T, rcond=None)[0].T


def best_rows(delta: ArrayLike, B: ArrayLike, row_weights: ArrayLike) -> Array:
    """argmin_V ‖D^½ (ΔW − B V)‖²."""
    root = np.sqrt(array(row_weights))[:, None]
    return np.linalg.lstsq(root * array(B), root * array(delta), rcond=None)[0]


# --- allocation --------------------------------------------------------------------------------


def least_plan_error(errors: ArrayLike, costs: list[int], budget: int,
                     max_choices: int | None = None) -> float:
    """The least summed error of all plans that hold to the budget, by trying every one."""
    table = array(errors)
    best = np.inf
    for plan in itertools.product(range(table.shape[1]), repeat=table.shape[0]):
        too_many = max_choices is not None and len(set(plan)) > max_choices
        if too_many or sum(costs[k] for k in plan) > budget:
            continue
        best = min(best, sum(table[i, k] for i, k in enumerate(plan)))
    return best


def least_plan_error_by_tables(errors: ArrayLike, costs: list[int], budget: int) -> float:
    """The same for many components and small budgets: a table of the least error at each cost."""
    unit = math.gcd(*costs)
    least = np.zeros(budget // unit + 1)
    for row in array(errors):
        choices = [np.full_like(least, np.inf) for _ in costs]
        for shifted, error, cost in zip(choices, row, costs, strict=True):
            steps = cost // unit
            shifted[steps:] = least[: len(least) - steps] + error
        least = np.min(choices, axis=0)
    return least[-1]


def plan_error_bounds(errors: ArrayLike, costs: list[int], budget: int) -> tuple[float, float]:
    """(LP optimum, a sum that the best plan does not exceed) of the multiple-choice knapsack.

    Every component starts at its cheapest choice and climbs the lower convex hull of its (cost,
    error) points. Taking the steps of all components by falling gain per bit until one no longer
    fits, and a fraction of that one, solves the linear relaxation (Dantzig); leaving that last
    step out is a plan, so the best plan lies at most that fraction of one step's gain above.
    """
    table = array(errors)
    total, left = 0.0, float(budget)
    steps: list[tuple[float, float, float]] = []  # gain per bit, cost, gain
    for row in table:
        hull = _lower_hull(sorted(zip(costs, row, strict=True)))
        total, left = total + hull[0][1], left - hull[0][0]
        for (cost, error), (next_cost, next_error) in itertools.pairwise(hull):
            gain = error - next_error
            steps.append((gain / (next_cost - cost), next_cost - cost, gain))
    assert left >= 0, "the budget does not pay for the cheapest choices"
    for _, cost, gain in sorted(steps, reverse=True):
        if cost > left:
            return total - gain * left / cost, total
        total, left = total - gain, left - cost
    return total, total


def _lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points, by rising cost, that no mixture of the others undercuts."""
    hull: list[tuple[int, float]] = []
    for cost, error in points:
        if hull and error >= hull[-1][1]:
            continue  # dearer and no better
        while len(hull) >= 2:
            (c0, e0), (c1, e1) = hull[-2:]
            if (e0 - e1) * (cost - c1) > (e1 - error) * (c1 - c0):
                break  # the middle point lies below the line from the first to the new one
            hull.pop()
        hull.append((cost, error))
    return hull
