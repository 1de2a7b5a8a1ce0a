"""ImPart (Yang et al., arXiv 2504.13237, Algorithm 1): singular vectors sparsified by importance.

Of the SVD of ΔW a share β of the components is cut off; of the vectors of component k a share
p_k = (1 − (σ_k / σ_1)^C) γ of the entries is dropped at random and the rest divided by 1 − p_k;
γ = (α − β) / (1 − β), and components from the end are dropped whole until a share α is gone in the
mean. They choose β and C on validation data: here, on the calibration inputs, from theirs and
neighbouring values; α is what fits the budget.

Stored: the kept entries of U and V and every singular value, 16 bits each, and the random
generator's 64-bit seed in place of the masks, which are drawn from it. The papers' combination with
quantization (sparse GPTQ) is not built.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from adamix import relative_error
from methods.reconstruction import Reconstruction

CUT = (0.6, 0.7, 0.8, 0.9, 0.95)  # β
POWERS = (0.5, 1.0)  # C
ENTRY_BITS, SEED_BITS, SEED, STEPS = 16, 64, 0, 200


def compress(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    factors = torch.linalg.svd(delta.double(), full_matrices=False)
    best, least = None, float("inf")
    for beta, power in itertools.product(CUT, POWERS):
        dropped = shares_within(factors[1], (delta.shape[0], delta.shape[1]), beta, power,
                                budget_bits)
        if dropped is None:
            continue
        dense = _sparsified(*factors, dropped)
        error = relative_error(delta, dense, gram)
        if error < least:
            bits = stored_bits((delta.shape[0], delta.shape[1]), dropped)
            best, least = Reconstruction(dense, bits, len(dropped)), error
    return best


def shares_within(s: Tensor, shape: tuple[int, int], beta: float, power: float, budget_bits: int
                  ) -> Tensor | None:
    """Dropped shares for the α that uses most of the budget; None where none keeps to it."""
    full = ENTRY_BITS * len(s) * sum(shape)
    kept = min(budget_bits / full, 1.0 - beta)  # α drops this share and up to one component more
    best, most = None, 0
    for share in torch.linspace(0.9 * kept, min(1.1 * kept, 1.0 - beta), STEPS).tolist():
        shares = dropped_shares(s, 1.0 - share, beta, power)
        bits = stored_bits(shape, shares)
        if len(shares) and most < bits <= budget_bits:
            best, most = shares, bits
    return best


def dropped_shares(s: Tensor, alpha: float, beta: float, power: float) -> Tensor:
    """p_k of the components that remain; with those cut off, their mean is α at least."""
    kept = s[: int(len(s) * (1.0 - beta))]
    gamma = (alpha - beta) / (1.0 - beta)
    if not len(kept):
        return kept
    shares = (1.0 - (kept / kept[0]) ** power) * gamma
    missing, last = gamma * len(kept) - shares.sum().item(), len(kept)
    while missing > 1e-12 and last:
        last -= 1
        missing -= 1.0 - shares[last].item()
    return shares[:last]


def kept_entries(length: int, shares: Tensor) -> list[int]:
    return [length - int(length * share) for share in shares.tolist()]


def stored_bits(shape: tuple[int, int], shares: Tensor) -> int:
    entries = sum(sum(kept_entries(length, shares)) for length in shape)
    return ENTRY_BITS * (entries + len(shares)) + SEED_BITS


def _sparsified(U: Tensor, s: Tensor, V: Tensor, shares: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(SEED)
    rank = len(shares)
    left = _masked(U[:, :rank].T, shares, random)
    right = _masked(V[:rank], shares, random)
    return (left.T @ (s[:rank, None].half().double() * right)).float()


def _masked(lanes: Tensor, shares: Tensor, random: torch.Generator) -> Tensor:
    """Lanes `[rank, n]` with random entries only, scaled up, as fp16 holds them."""
    masked = torch.zeros_like(lanes)
    for k, count in enumerate(kept_entries(lanes.shape[1], shares)):
        kept = torch.randperm(lanes.shape[1], generator=random)[:count]
        masked[k, kept] = lanes[k, kept] / (1.0 - shares[k])
    return masked.half().double()
