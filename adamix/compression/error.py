"""The figure that everything here is judged by."""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(delta: Tensor, restored: Tensor, gram: Tensor | None = None,
                   row_weights: Tensor | None = None) -> float:
    """‖D^½ (ΔW − Δ̂) X‖² / ‖D^½ ΔW X‖², with the undamped Gram matrix.

    Args:
        delta, restored: ΔW and Δ̂ `[out, in]`.
        gram: X Xᵀ `[in, in]`; None for I.
        row_weights: D's diagonal `[out]`; None for ones.

    Returns:
        The error; 0 where both ΔW X and its error are 0.
    """
    lost, whole = delta.double() - restored.double(), delta.double()
    if row_weights is not None:
        root = row_weights.double().sqrt()[:, None]
        lost, whole = lost * root, whole * root
    energies = [(part if gram is None else part @ gram.double()).mul(part).sum().item()
                for part in (lost, whole)]
    if energies[1] == 0:
        return 0.0 if energies[0] == 0 else math.inf
    return energies[0] / energies[1]
