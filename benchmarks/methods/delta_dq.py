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

import math

import torch
from torch import Tensor

from methods.reconstruction import Reconstruction
from methods.scaling import FACTOR_BITS, best_scaled
from methods.ultradelta import rounded

GROUPS, WIDTHS, SEED = (16, 32, 64, 128, 256), (2, 3, 4, 8), 0
BESIDE = 64 + 2 * 16 + FACTOR_BITS  # bits: the seed, least and largest, the factor


def compress(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    chosen = chosen_codes(delta, gram, budget_bits)
    return None if chosen is None else dropped(delta, gram, *chosen, budget_bits)


def chosen_codes(delta: Tensor, gram: Tensor, budget_bits: int) -> tuple[int, int] | None:
    """The width and the group with the least error; None where none keeps an entry."""
    gram, target = gram.double(), delta.double()
    seen, best, least = target @ gram, None, math.inf
    for group in GROUPS:
        places = places_in_groups(delta.shape, group)
        for bits in WIDTHS:
            is_kept = places < kept_of(group, bits, delta, budget_bits)
            if not is_kept.any():
                continue
            dense = torch.zeros_like(target)
            dense[is_kept] = rounded(delta[is_kept], bits).double()
            energy, shared = ((dense @ gram) * dense).sum(), (seen * dense).sum()
            error = -(shared**2 / energy).item()  # of the best factor, less ‖ΔW X‖²
            if error < least:
                best, least = (bits, group), error
    return best


def dropped(delta: Tensor, gram: Tensor, bits: int, group: int, budget_bits: int) -> Reconstruction:
    """With one width and group, and as large a share of each group as the budget pays for."""
    is_kept = places_in_groups(delta.shape, group) < kept_of(group, bits, delta, budget_bits)
    dense = torch.zeros_like(delta)
    if not is_kept.any():
        return Reconstruction(dense, 0)
    dense[is_kept] = rounded(delta[is_kept], bits)
    return Reconstruction(best_scaled(delta, dense, gram), int(is_kept.sum()) * bits + BESIDE)


def kept_of(group: int, bits: int, delta: Tensor, budget_bits: int) -> Tensor:
    """How many entries stay of the group of each input `[in]`, rounded down."""
    share = min((budget_bits - BESIDE) / (bits * delta.numel()), 1.0)
    return torch.tensor([int(share * part.shape[0])
                         for part in torch.empty(delta.shape[1]).split(group) for _ in part])


def places_in_groups(shape: torch.Size, group: int) -> Tensor:
    """The place of every entry in a random order of its group of a row, int64 `[out, in]`."""
    random = torch.Generator().manual_seed(SEED)
    return torch.cat([
        torch.rand(shape[0], part.shape[0], generator=random).argsort(dim=1).argsort(dim=1)
        for part in torch.empty(shape[1]).split(group)], dim=1)
