"""DeltaDQ (Jiang et al., arXiv 2410.08666): dropout by groups, then separate quantization.

After its abstract and what other papers say of it: every row of ΔW is cut into groups, and in each
the same number of entries is kept, at random; those are rounded to 2^b levels between the least
and the largest. What is left is divided by the share kept; here it has the factor that is best
for the calibration inputs (scaling.py), which contains the division. Group and b: the best of
GROUPS and WIDTHS on the calibration inputs.

Separate quantization then stores the codes in parts by their top bits, each part with the bits
below. Where an entry is in one part or another is what its top bits say: with everything counted
that saves nothing.

Stored: b bits a kept entry, in the order in which a seed of 64 bits draws them; least, largest and
factor in 16 bits each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adamix import relative_error
from methods.reconstruction import Reconstruction
from methods.scaling import FACTOR_BITS, best_scaled
from methods.ultradelta import rounded

GROUPS, WIDTHS, SEED = (16, 32, 64, 128, 256), (2, 3, 4, 8), 0
BESIDE = 64 + 2 * 16 + FACTOR_BITS  # bits: the seed, least and largest, the factor


def compress(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    tried = [dropped(delta, gram, bits, group, budget_bits) for bits in WIDTHS for group in GROUPS]
    found = [result for result in tried if result.bits > BESIDE]
    return min(found, key=lambda result: relative_error(delta, result.dense, gram), default=None)


def dropped(delta: Tensor, gram: Tensor, bits: int, group: int, budget_bits: int) -> Reconstruction:
    """With one width and group, and as large a share of each group as the budget pays for."""
    share = min((budget_bits - BESIDE) / (bits * delta.numel()), 1.0)
    is_kept = keep_of_groups(delta.shape, group, share)
    dense = torch.zeros_like(delta)
    if not is_kept.any():
        return Reconstruction(dense, 0)
    dense[is_kept] = rounded(delta[is_kept], bits)
    return Reconstruction(best_scaled(delta, dense, gram), int(is_kept.sum()) * bits + BESIDE)


def keep_of_groups(shape: torch.Size, group: int, share: float) -> Tensor:
    """Which entries stay, bool `[out, in]`: of each group of a row that share, rounded down."""
    random = torch.Generator().manual_seed(SEED)
    kept = []
    for width in (part.shape[0] for part in torch.empty(shape[1]).split(group)):
        place = torch.rand(shape[0], width, generator=random).argsort(dim=1).argsort(dim=1)
        kept.append(place < int(share * width))
    return torch.cat(kept, dim=1)
