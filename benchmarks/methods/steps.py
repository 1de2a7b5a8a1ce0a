"""The steps of `adamix.compression.matrix`, in their order, with codes of any kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import adamix
from adamix.artifacts import Hessian
from adamix.budget import COUNTS_BYTES
from adamix.compression.allocate import allocate
from adamix.compression.correct import component_gram, correct, solve_rows
from adamix.compression.decompose import decompose
from adamix.compression.hessian import hessian
from adamix.compression.matrix import component_bits
from methods.reconstruction import Reconstruction

PLAIN = adamix.Config(bits_per_weight=1.0, passes=2, damping=0.01, svd_damping=0.0, unbiased=False,
                      separate_widths=False)


@dataclass(frozen=True)
class Codes:
    """Codes of b bits a number and a scale of 32 bits a lane, by what they make of lanes."""

    quantize_rows: Callable[[Tensor, int, Hessian], Tensor]  # V [m, in] at one width, GPTQ under H
    quantize_columns: Callable[[Tensor, Tensor, Tensor], Tensor]  # Ũ [out, rank], widths, A H Aᵀ
    lost: Callable[[Tensor, int], Tensor]  # the share of each lane's energy that rounding loses


def compress(codes: Codes, delta: Tensor, gram: Tensor, budget_bits: int,
             config: adamix.Config | None = None) -> Reconstruction | None:
    """With one width for both lanes of a component; None where the budget pays for none."""
    config = config or PLAIN
    widths = config.bit_widths
    costs = [component_bits(delta.shape, b) for b in widths]
    budget = budget_bits - 8 * COUNTS_BYTES
    if budget < min(costs):
        return None
    H, delta = hessian(gram, config.damping), delta.double()
    factors = decompose(delta, H, budget // min(costs))
    V_at = {b: codes.quantize_rows(factors.V, b, H) for b in widths}
    whole = factors.s**2 * _energy(factors.V, H.matrix)
    errors = [factors.s**2 * _energy(factors.V - V_at[b], H.matrix)
              + whole * codes.lost(factors.U.T, b) for b in widths]
    choice = allocate(torch.stack([*errors, whole], dim=1), [*costs, 0], budget)
    all_bits = torch.tensor([*widths, 0])[choice]
    kept = torch.sort(all_bits, descending=True, stable=True).indices[: int((all_bits > 0).sum())]
    bits, s = all_bits[kept], factors.s[kept]
    V = torch.stack([V_at[int(b)][i] for b, i in zip(bits, kept, strict=True)])

    def quantized_u() -> Tensor:
        A = s[:, None] * V
        A_gram = component_gram(A, H)
        return codes.quantize_columns(correct(delta, A, H, A_gram), bits, A_gram)

    U = quantized_u()
    for _ in range(config.passes - 1):
        V_star = solve_rows(delta, U)
        s = torch.linalg.vector_norm(V_star, dim=1)
        for b in bits.unique().tolist():
            V[bits == b] = codes.quantize_rows(V_star[bits == b] / s[bits == b, None], b, H)
        U = quantized_u()
    used = sum(component_bits(delta.shape, int(b)) for b in bits) + 8 * COUNTS_BYTES
    return Reconstruction(((U * s) @ V).float(), used, len(bits))


def _energy(rows: Tensor, H: Tensor) -> Tensor:
    return ((rows @ H) * rows).sum(dim=1)
