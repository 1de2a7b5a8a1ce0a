"""Real lanes -> codes: the scale of a lane by search, its codes by GPTQ (ops.gptq)."""

from __future__ import annotations

import torch
from torch import Tensor

from adamix import ops
from adamix.artifacts import Hessian, Lanes
from adamix.compression.hessian import inverse_upper

# A lane's scale is sought between the one whose top level is the mean magnitude (the best there is
# at 1 bit, and below the best at any other width) and the one that just reaches the largest entry.
CANDIDATES = 32
AT_A_TIME = 2**18  # entries: all that is made of them stays in a core's cache, 15 times as fast
REFINEMENTS = 5  # alternations of nearest codes and least-squares scale after the search


def nearest_codes(lanes: Tensor, bits: Tensor, scales: Tensor) -> Tensor:
    """q = clamp(⌊w / (2 scale)⌋ + 2^(b−1), 0, 2^b − 1) for `[m, n]` lanes; fp32 whole numbers."""
    half = 2.0 ** (bits.float() - 1.0)[:, None]
    codes = torch.floor(lanes / (2.0 * scales[:, None])) + half
    return torch.minimum(codes.clamp_min_(0.0), 2.0 * half - 1.0)


def search_scales(lanes: Tensor, bits: Tensor, weights: Tensor | None = None) -> Tensor:
    """One scale a lane with the least (weighted) squared rounding error.

    Args:
        lanes: `[m, n]` fp32.
        bits: `[m]` int32 widths, 1..8.
        weights: `[n]` fp32, the cost of an entry's squared error; None for ones.

    Returns:
        `[m]` fp32, positive also for a lane of zeros.
    """
    rows = max(1, AT_A_TIME // max(lanes.shape[1], 1))
    parts = zip(lanes.split(rows), bits.split(rows), strict=True)
    return torch.cat([_search_scales(*part, weights) for part in parts])


def _search_scales(lanes: Tensor, bits: Tensor, weights: Tensor | None) -> Tensor:
    top = 2.0 ** bits.float() - 1.0
    least = torch.finfo(torch.float32).tiny * 2**40
    widest = lanes.abs().amax(dim=1).clamp_min(least) / top
    narrowest = torch.minimum(lanes.abs().mean(dim=1).clamp_min(least) / top, widest)
    best, best_error = widest, torch.full_like(widest, torch.inf)
    for share in torch.linspace(0.0, 1.0, CANDIDATES).tolist():
        scales = narrowest * (widest / narrowest) ** share
        _, error = _fit(lanes, bits, scales, weights)
        better = error < best_error
        best, best_error = torch.where(better, scales, best), torch.where(better, error, best_error)
    for _ in range(REFINEMENTS):
        fitted, _ = _fit(lanes, bits, best, weights)
        usable = fitted > 0
        _, error = _fit(lanes, bits, torch.where(usable, fitted, best), weights)
        better = usable & (error < best_error)
        best, best_error = torch.where(better, fitted, best), torch.where(better, error, best_error)
    return best


def _fit(lanes: Tensor, bits: Tensor, scales: Tensor, weights: Tensor | None
         ) -> tuple[Tensor, Tensor]:
    """(least-squares scale for the nearest codes, squared error at the given scale)."""
    levels = 2.0 * nearest_codes(lanes, bits, scales) - (2.0 ** bits.float() - 1.0)[:, None]
    weighted = levels if weights is None else levels * weights
    cross, power = (lanes * weighted).sum(dim=1), (levels * weighted).sum(dim=1)
    return cross / power, power * scales**2 - 2.0 * cross * scales


def quantize_rows(rows: Tensor, bits: Tensor, H: Hessian) -> Lanes:
    """GPTQ on rows of V: each row at its own width, errors compensated under H (paper eq. 1).

    Args:
        rows: `[m, in]`; independent of each other, so one row may come once for every width.
        bits: `[m]` int32.
        H: Hessian of the inputs `[in, in]`.
    """
    rows = rows.float().contiguous()
    scales = search_scales(rows, bits)
    ordered = ops.gptq(rows[:, H.order], H.inverse_upper, bits, scales, by_row=True)
    codes = torch.empty_like(ordered)
    codes[:, H.order] = ordered
    return Lanes(codes, bits, scales)


def quantize_columns(U: Tensor, bits: Tensor, hessian: Tensor, weights: Tensor | None = None
                     ) -> Lanes:
    """GPTQ over the columns of Ũ, each column at its own width (paper eq. 6 and 9).

    Args:
        U: `[out, rank]`.
        bits: `[rank]` int32.
        hessian: A H Aᵀ `[rank, rank]` fp64, already damped.
        weights: `[out]`, cost of a row's squared error in the search for scales.

    Returns:
        Lanes: one lane a column, codes `[rank, out]`.
    """
    columns = U.float().contiguous()
    scales = search_scales(columns.T.contiguous(), bits,
                           None if weights is None else weights.float())
    factor = inverse_upper(torch.cholesky_inverse(torch.linalg.cholesky(hessian)))
    codes = ops.gptq(columns, factor, bits, scales, by_row=False)
    return Lanes(codes.T.contiguous(), bits, scales)
