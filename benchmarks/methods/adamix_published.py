"""AdaMix as published (the paper's Algorithm 1), with its quantizer rather than this project's.

Plain SVD of ΔW; the error of V alone (eq. 5) of every component at 8..2 and 0 bits from a GPTQ run
at each; the integer program of eq. 10 with f_max = 4; Target Correction for Consistency (eq. 8) or,
for the ablation of section 4.4, none; GPTQ on U's columns. Storage: components.py. Eq. 10 counts
codes only; here the budget is that of everything stored. What U's scales take depends on the plan:
the program is solved again with what they leave. (Fewer widths would leave more for codes, but the
plans that V's error alone then prefers are worse: 0.0306 and 0.0270 at 1 bit, for 0.0303, 0.0237.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adamix.compression.allocate import allocate
from methods.components import (
    Factors,
    component_bits,
    plain_svd,
    quantize_components,
    stored_bits,
)
from methods.quantizer import gptq, group_index_bits
from methods.reconstruction import Reconstruction

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
MAX_WIDTHS = 4  # in use, 0 bits counted
SOLVES = 6


def corrected(delta: Tensor, gram: Tensor, budget_bits: int, *, max_widths: int | None = MAX_WIDTHS,
              solve: Callable[..., Tensor] = allocate) -> Reconstruction:
    """`max_widths` is f_max; `solve` stands for `allocate`."""
    factors = plain_svd(delta)
    widths = plan(delta, gram, budget_bits, max_widths=max_widths, solve=solve, factors=factors)
    return quantize_components(delta, gram, widths, correction=True, factors=factors)


def uncorrected(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction:
    factors = plain_svd(delta)
    widths = plan(delta, gram, budget_bits, factors=factors)
    return quantize_components(delta, gram, widths, correction=False, factors=factors)


def plan(delta: Tensor, gram: Tensor, budget_bits: int, *, max_widths: int | None = MAX_WIDTHS,
         solve: Callable[..., Tensor] = allocate, factors: Factors | None = None
         ) -> dict[int, int]:
    """Component -> bits, of those that keep any: the plan of least error that fits."""
    shape = (delta.shape[0], delta.shape[1])
    costs = [component_bits(shape, bits) for bits in WIDTHS]
    errors = v_errors(delta, gram, budget_bits // min(costs), factors)
    plan, least, left = {}, float("inf"), budget_bits - group_index_bits(shape[1])
    for _ in range(SOLVES):
        if left < 0 or not len(errors):
            break
        choice = solve(errors, [*costs, 0], left, max_choices=max_widths)
        bits = torch.tensor([*WIDTHS, 0])[choice].tolist()
        widths = {component: width for component, width in enumerate(bits) if width}
        error = errors.gather(1, choice[:, None]).sum().item()
        stored = stored_bits(shape, widths.values())
        if stored <= budget_bits and error < least:
            plan, least = widths, error
        before, left = left, budget_bits - stored + sum(costs[WIDTHS.index(width)]
                                                        for width in widths.values())
        if left == before:
            break
    return plan


def v_errors(delta: Tensor, gram: Tensor, most: int, factors: Factors | None = None) -> Tensor:
    """e_V `[components, widths + 1]` of the `most` leading components (paper eq. 5)."""
    _, s, V = factors or plain_svd(delta)
    s, V, gram = s[:most], V[:most], gram.double()
    rank = len(s)
    bits = torch.tensor(WIDTHS).repeat_interleave(rank)
    V_hat = gptq(V.repeat(len(WIDTHS), 1), gram, bits[:, None]).double()
    lost = V_hat.view(len(WIDTHS), rank, -1).neg_().add_(V)
    lost = torch.cat([lost, V[None]])
    return ((lost @ gram) * lost).sum(dim=2).T * s[:, None] ** 2
