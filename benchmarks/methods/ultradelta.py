"""UltraDelta (Wang et al., arXiv 2505.13563): even quantization, random pruning value by value.

After its abstract and the facts of its public code: ΔW is rounded to 2^b levels between its least
and its largest entry; of the entries of each level the same share is dropped at random; what is
left is divided by the share kept and multiplied by a factor from trace norms, whose rule is in
neither source: here the factor is the best one for the calibration inputs (scaling.py), which
contains the division. Every matrix has the same budget here, so the mixed sparsity between layers
is not built. b: the best of 2, 3, 4 on the calibration inputs.

Stored: b bits a kept entry, their places in log2 (N over kept) bits (the mask follows the values,
so no seed gives it), least, largest and factor in 16 bits each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamix import relative_error
from methods.reconstruction import Reconstruction
from methods.scaling import FACTOR_BITS, best_scaled

WIDTHS, SEED = (2, 3, 4), 0


def compress(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction:
    tried = [pruned(delta, gram, bits, budget_bits) for bits in WIDTHS]
    return min(tried, key=lambda result: relative_error(delta, result.dense, gram))


def pruned(delta: Tensor, gram: Tensor, bits: int, budget_bits: int) -> Reconstruction:
    """At one width, with as many entries as the budget pays for."""
    low, high = 0, delta.numel()
    while low < high:
        middle = (low + high + 1) // 2
        fits = stored_bits(delta.numel(), middle, bits) <= budget_bits
        low, high = (middle, high) if fits else (low, middle - 1)
    dense, kept = keep_share(rounded(delta, bits), low / delta.numel())
    return Reconstruction(best_scaled(delta, dense, gram), stored_bits(delta.numel(), kept, bits))


def rounded(delta: Tensor, bits: int) -> Tensor:
    low, high = delta.min().half().float(), delta.max().half().float()
    step = (high - low) / (2**bits - 1)
    return low + step * torch.round((delta - low) / step).clamp(0, 2**bits - 1)


def keep_share(values: Tensor, share: float) -> tuple[Tensor, int]:
    """At random that share of the entries of each value, rounded down, and how many those are."""
    random = torch.Generator().manual_seed(SEED)
    flat, sparse, kept = values.flatten(), torch.zeros(values.numel()), 0
    for value in flat.unique():
        places = torch.nonzero(flat == value)[:, 0]
        count = int(share * len(places))
        sparse[places[torch.randperm(len(places), generator=random)[:count]]] = value
        kept += count
    return sparse.view_as(values), kept


def stored_bits(entries: int, kept: int, bits: int) -> int:
    places = math.lgamma(entries + 1) - math.lgamma(kept + 1) - math.lgamma(entries - kept + 1)
    return kept * bits + math.ceil(places / math.log(2.0)) + 2 * 16 + FACTOR_BITS
