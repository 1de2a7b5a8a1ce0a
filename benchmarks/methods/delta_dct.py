"""Delta-DCT (Huang et al., arXiv 2503.06676): patches of ΔW as a JPEG image's.

After the abstract and a public re-implementation (sadeghianmr/delta_dct_project), as the paper's
own text was not at hand: square patches, ordered by their L2 norm; the first at 2 bits, the others
at none; each in the 2D DCT (type II, orthonormal), rounded evenly between its least and its largest
coefficient; back; a factor a matrix (scaling.py). "1 bit" there is half the patches at 2 bits; here
as many as fit the budget. Stored: codes, least and largest in 16 bits for each kept patch, a bit a
patch that says which are, and the factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.reconstruction import Reconstruction
from methods.scaling import FACTOR_BITS, best_scaled

SIDE, BITS = 16, 2


def compress(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction:
    patches = patches_of(delta)
    patch_bits = BITS * SIDE * SIDE + 2 * 16
    count = min((budget_bits - FACTOR_BITS - len(patches)) // patch_bits, len(patches))
    if count < 1:
        return Reconstruction(torch.zeros_like(delta), 0)
    kept = torch.linalg.vector_norm(patches, dim=(1, 2)).argsort(descending=True, stable=True)
    kept = kept[:count]
    cosines = dct_matrix(SIDE)
    restored = torch.zeros_like(patches)
    restored[kept] = cosines.T @ round_evenly(cosines @ patches[kept] @ cosines.T) @ cosines
    dense = best_scaled(delta, joined(restored, (delta.shape[0], delta.shape[1])), gram)
    return Reconstruction(dense, count * patch_bits + len(patches) + FACTOR_BITS)


def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II: a patch P becomes C P Cᵀ."""
    k, n = torch.arange(size)[:, None], torch.arange(size)[None, :]
    cosines = torch.cos(torch.pi * (2 * n + 1) * k / (2 * size)) * (2.0 / size) ** 0.5
    cosines[0] /= 2.0**0.5
    return cosines


def round_evenly(patches: Tensor) -> Tensor:
    """2^b levels from the least to the largest of each patch, both as fp16 holds them."""
    low = patches.amin(dim=(1, 2), keepdim=True).half().float()
    high = patches.amax(dim=(1, 2), keepdim=True).half().float()
    step = (high - low).clamp_min(1e-30) / (2**BITS - 1)
    codes = torch.round((patches - low) / step).clamp(0, 2**BITS - 1)
    return low + step * codes


def patches_of(matrix: Tensor) -> Tensor:
    """`[patches, SIDE, SIDE]`, the matrix padded with zeros."""
    pad = [-length % SIDE for length in matrix.shape]
    padded = torch.nn.functional.pad(matrix, (0, pad[1], 0, pad[0]))
    grid = padded.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE)
    return grid.reshape(-1, SIDE, SIDE)


def joined(patches: Tensor, shape: tuple[int, int]) -> Tensor:
    rows, columns = (-(-length // SIDE) for length in shape)
    grid = patches.view(rows, columns, SIDE, SIDE).transpose(1, 2)
    return grid.reshape(rows * SIDE, columns * SIDE)[: shape[0], : shape[1]].contiguous()
