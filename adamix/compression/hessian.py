"""Gram matrix of the calibration inputs -> damped Hessian and its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from adamix.artifacts import Hessian
from adamix.errors import NonFiniteError

COLUMNS = 2048  # of a triangular inverse at a time: few enough to skip most of the zeros above
INVERSE_RIDGE = 1e-6  # of the mean diagonal, for A H Aᵀ and BᵀB


def damp(matrix: Tensor, share: float) -> Tensor:
    """matrix + share · mean(diagonal) · I."""
    damped = matrix.clone()
    damped.diagonal().add_(share * matrix.diagonal().mean())
    return damped


def hessian(gram: Tensor, damping: float) -> Hessian:
    """H = X Xᵀ + λ I with λ = `damping` of the mean diagonal, and its factors.

    Args:
        gram: X Xᵀ `[in, in]`, symmetric, any float dtype; not overwritten.
        damping: in (0, 1). With few tokens, or tokens unlike those to come, much of it helps:
            2,048 of a model's own, 20 % in place of 1 %, a third off the error on its tasks.

    Raises:
        ValueError: `gram` is not square, zero, or no X Xᵀ; NonFiniteError: NaN or Inf.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix must be square [in, in], got {tuple(gram.shape)}")
    gram = gram.double()
    if not torch.isfinite(gram).all():
        raise NonFiniteError("the Gram matrix holds NaN or Inf: the activations overflowed")
    if not gram.diagonal().mean() > 0:
        raise ValueError("the Gram matrix is zero: no calibration token reached this matrix")
    # The plan must not depend on the unit of the activations: bring the mean diagonal to 1.
    matrix = gram / gram.diagonal().mean()
    del gram  # [in, in] in fp64 each: at 18944 inputs one of them takes 2.9 GB
    ridge = damping * matrix.diagonal().mean().item()
    matrix.diagonal().add_(ridge)
    # GPTQ rounds the inputs that weigh most while all others can still make up for it (act-order):
    # 1.6 % less error than in the inputs' own order, on 14 matrices of a real fine-tune.
    order = torch.argsort(matrix.diagonal(), descending=True, stable=True)
    try:
        return Hessian(matrix, order, inverse_upper(matrix, order), ridge)
    except torch.linalg.LinAlgError:
        raise ValueError("the Gram matrix is not positive semidefinite: expected X Xᵀ") from None


def inverse_upper(matrix: Tensor, order: Tensor | None = None) -> Tensor:
    """The upper Cholesky factor of H⁻¹ in fp32, as `ops.gptq` takes it.

    With J, which turns rows around, and J H J = L Lᵀ it is J L⁻¹ J: the inverse is never formed.

    Args:
        matrix: H `[n, n]` fp64.
        order: of its rows and columns; None for their own.

    Raises:
        LinAlgError: H is not positive definite.
    """
    n = len(matrix)
    turned = torch.arange(n - 1, -1, -1, device=matrix.device) if order is None else order.flip(0)
    lower = torch.linalg.cholesky(matrix[turned[:, None], turned])
    upper = torch.zeros(n, n, device=matrix.device)
    for begin in range(0, n, COLUMNS):
        unit = torch.eye(n - begin, min(COLUMNS, n - begin), dtype=matrix.dtype,
                         device=matrix.device)
        part = torch.linalg.solve_triangular(lower[begin:, begin:], unit, upper=False)
        end = n - begin
        upper[:end, end - part.shape[1] : end] = part.flip(0, 1)
    return upper


def identity(n: int, device: torch.device | str = "cpu") -> Hessian:
    """H = I, for a matrix whose inputs are one-hot (an embedding)."""
    eye = torch.eye(n, dtype=torch.float64, device=device)
    return Hessian(eye, torch.arange(n, device=device), eye.float())
