"""Real lanes -> codes: the scale of a lane by search, its codes by GPTQ (ops.gptq)."""

from __future__ import annotations

import torch
from torch import Tensor

from adamix import ops
from adamix.artifacts import Hessian, Lanes
from adamix.compression.hessian import inverse_upper


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
    return ops.search_scales(lanes, bits, weights)


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
    scales = search_scales(columns.T, bits, None if weights is None else weights.float())
    codes = ops.gptq(columns, inverse_upper(hessian), bits, scales, by_row=False)
    return Lanes(codes.T.contiguous(), bits, scales)
