"""The figure that everything here is judged by."""

from __future__ import annotations

from torch import Tensor


def relative_error(delta: Tensor, restored: Tensor, gram: Tensor | None = None,
                   row_weights: Tensor | None = None) -> float:
    """‖D^½ (ΔW − Δ̂) X‖² / ‖D^½ ΔW X‖², with the undamped Gram matrix.

    Args:
        delta, restored: ΔW and Δ̂ `[out, in]`.
        gram: X Xᵀ `[in, in]`; None for I.
        row_weights: D's diagonal `[out]`; None for ones.
    """
    lost, whole = delta.double() - restored.double(), delta.double()
    if row_weights is not None:
        root = row_weights.double().sqrt()[:, None]
        lost, whole = lost * root, whole * root
    if gram is None:
        return (lost.square().sum() / whole.square().sum()).item()
    gram = gram.double()
    return (((lost @ gram) * lost).sum() / ((whole @ gram) * whole).sum()).item()
