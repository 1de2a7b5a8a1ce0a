"""Least-squares targets: the U that absorbs V̂'s error, and the V that absorbs Û's; and the scales
that make up for what rounding takes off the components."""

from __future__ import annotations

import torch
from torch import Tensor

from adamix.artifacts import Factors, Hessian
from adamix.compression.hessian import INVERSE_RIDGE, damp

LEAST_KEPT, MOST_GAIN = 0.3, 1.6  # of a component, for a gain; and the largest gain


def component_gram(A: Tensor, H: Hessian) -> Tensor:
    """A H Aᵀ `[rank, rank]`, damped: the Hessian of U's columns (paper eq. 6)."""
    return damp(A @ H.matrix @ A.T, INVERSE_RIDGE)


def correct(delta: Tensor, A: Tensor, H: Hessian, gram: Tensor) -> Tensor:
    """Target Correction for Consistency, Ũ = ΔW H Aᵀ (A H Aᵀ)⁻¹ (paper eq. 8).

    ΔW is the whole delta, not its kept components, so Ũ also takes up what the rank cuts off.

    Args:
        delta: ΔW `[out, in]` fp64.
        A: diag(s) V̂ `[rank, in]` fp64.
        H: Hessian of the inputs.
        gram: `component_gram(A, H)`.

    Returns:
        Ũ `[out, rank]` fp64.
    """
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(A @ H.matrix @ delta.T, factor).T


def component_gains(factors: Factors, U_hat: Tensor, V_hat: Tensor) -> Tensor:
    """By what each component is to be multiplied so that Δ̂ has all of it, 1 / kept with

        kept_i = u_iᵀ (û_i v̂_i) v_iᵀ / s_i

    Rounded with the least error a component keeps less than 1 of itself. Those that rounding has
    turned into something else are left alone.

    Args:
        factors: of the components.
        U_hat: their rounded columns `[out, rank]` fp64, singular values in them; times D^½ where
            the factors are of D^½ ΔW.
        V_hat: their rounded rows `[rank, in]` fp64.

    Returns:
        `[rank]` fp64, at most MOST_GAIN.
    """
    kept = (factors.U * U_hat).sum(dim=0) * (factors.V * V_hat).sum(dim=1) / factors.s
    return torch.where(kept > LEAST_KEPT, 1.0 / kept, 1.0).clamp(max=MOST_GAIN)


def solve_rows(delta: Tensor, B: Tensor, weights: Tensor | None = None) -> Tensor:
    """V* = (Bᵀ D B)⁻¹ Bᵀ D ΔW, the best rows for a fixed Û whatever the inputs.

    Args:
        delta: ΔW `[out, in]` fp64.
        B: Û diag(s) `[out, rank]` fp64.
        weights: D's diagonal `[out]` fp64; None for ones.
    """
    weighted = B if weights is None else B * weights[:, None]
    factor = torch.linalg.cholesky(damp(weighted.T @ B, INVERSE_RIDGE))
    return torch.cholesky_solve(weighted.T @ delta, factor)
