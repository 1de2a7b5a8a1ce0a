"""The search for scales in torch calls: what ops.search_scales computes, pass by pass.

It was adamix's own until the operator. Its sums cancel, which costs fp32 lanes up to 7 digits of
the error; lanes in float64 give what it means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adamix.compression.quantize import nearest_codes

# A lane's scale is sought between the one whose top level is the mean magnitude (the best there is
# at 1 bit, and below the best at any other width) and the one that just reaches the largest entry.
CANDIDATES = 32
REFINEMENTS = 5  # alternations of nearest codes and least-squares scale after the search


def search_scales_in_torch(lanes: Tensor, bits: Tensor, weights: Tensor | None = None
                           ) -> Tensor:
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
