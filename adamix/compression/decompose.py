"""ΔW, H -> Factors: the singular value decomposition that the components come from."""

from __future__ import annotations

import torch
from torch import Tensor

from adamix.artifacts import Factors, Hessian
from adamix.compression.hessian import damp


def decompose(delta: Tensor, H: Hessian, max_rank: int, *, plain: bool = False,
              damping: float = 0.0) -> Factors:
    """The `max_rank` leading components of ΔW.

    Output-aware: the SVD of ΔW L with H = L Lᵀ, kept as U and the rows of V' L⁻¹, normalised;
    since U is orthonormal, diag(s) V = Uᵀ ΔW, so neither the SVD nor L⁻¹ is ever formed.
    Plain: the SVD of ΔW, as in the paper's Algorithm 1.

    Args:
        delta: ΔW `[out, in]`.
        H: Hessian of the inputs.
        max_rank: how many components at most; fewer come back where ΔW has fewer.
        plain: the paper's decomposition.
        damping: a share of H's mean diagonal, added to it here alone.

    Returns:
        Factors in order of falling output energy (falling s where `plain`), the largest entry of
        every column of U positive.
    """
    delta = delta.double()
    if plain:
        U = torch.linalg.svd(delta, full_matrices=False).U
    elif delta.shape[0] <= delta.shape[1]:
        square = delta @ H.matrix @ delta.T
        if damping:
            square += damping * H.matrix.diagonal().mean() * (delta @ delta.T)
        energies, U = torch.linalg.eigh(square)
        U = U.flip(1)
    else:
        whitened = delta @ (torch.linalg.cholesky(damp(H.matrix, damping)) if damping else H.lower)
        energies, right = torch.linalg.eigh(whitened.T @ whitened)
        U = _orthonormal_columns(whitened, *(part.flip(-1)[..., :max_rank]
                                             for part in (energies, right)))
    U = _fix_signs(U[:, :max_rank])
    scaled_rows = U.T @ delta  # diag(s) V
    s = torch.linalg.vector_norm(scaled_rows, dim=1)
    kept = s > 1e-12 * s.amax() if len(s) else s > 0
    return Factors(U[:, kept], s[kept], scaled_rows[kept] / s[kept, None])


def _orthonormal_columns(whitened: Tensor, energies: Tensor, right: Tensor) -> Tensor:
    """The left singular vectors `whitened · right / Σ`, less those that are rounding alone."""
    kept = energies > 1e-13 * energies[0].clamp_min(0.0)
    return whitened @ (right[:, kept] / energies[kept].sqrt())


def _fix_signs(U: Tensor) -> Tensor:
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    return U * torch.where(largest < 0, -1.0, 1.0)
