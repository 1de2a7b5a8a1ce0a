"""Components at given widths, as Delta-CoMe and AdaMix store them: ΔW ≈ Û · diag(s) · V̂.

Stored are codes, a 16-bit scale and a b-bit zero point a group (quantizer.py), 16 bits a singular
value, and which group each input is of. V's groups are 128 inputs of a component, U's are 128
components of an output, of one width: two components of 8 bits cost every output a scale too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from adamix.compression.hessian import INVERSE_RIDGE, damp
from methods.quantizer import GROUP, SCALE_BITS, gptq, group_index_bits, row_bits
from methods.reconstruction import Reconstruction

SINGULAR_VALUE_BITS = 16


def component_bits(shape: tuple[int, int], bits: int) -> int:
    """One component without the scales of U, which it shares with others."""
    out, inputs = shape
    return row_bits(inputs, bits) + out * bits + SINGULAR_VALUE_BITS


def stored_bits(shape: tuple[int, int], widths: Iterable[int]) -> int:
    """All components, everything counted."""
    count = Counter(widths)
    scales = sum(math.ceil(number / GROUP) * (SCALE_BITS + bits) for bits, number in count.items())
    return (sum(component_bits(shape, bits) * number for bits, number in count.items())
            + shape[0] * scales + group_index_bits(shape[1]) * bool(count))


Factors = tuple[Tensor, Tensor, Tensor]


def plain_svd(delta: Tensor) -> Factors:
    """U, s, V of ΔW in fp64, s as 16 bits hold it."""
    U, s, V = torch.linalg.svd(delta.double(), full_matrices=False)
    return U, s.half().double(), V


def quantize_components(delta: Tensor, gram: Tensor, widths: Mapping[int, int], *,
                        correction: bool, by_class: bool = False,
                        factors: Factors | None = None) -> Reconstruction:
    """V by GPTQ on its rows, then U, or Ũ, by GPTQ on its columns (paper Algorithm 1).

    Args:
        delta, gram: ΔW and X Xᵀ.
        widths: component -> bits; those left out are not stored.
        correction: Target Correction for Consistency first (paper eq. 8).
        by_class: U's components of each width on their own, as Delta-CoMe goes about it.
        factors: ΔW's `plain_svd`, where the caller has it.
    """
    if not widths:
        return Reconstruction(torch.zeros_like(delta), 0)
    U, s, V = factors or plain_svd(delta)
    kept = sorted(widths, key=lambda component: (-widths[component], component))
    bits, gram = torch.tensor([widths[component] for component in kept]), gram.double()
    A = s[kept, None] * gptq(V[kept], gram, bits[:, None]).double()
    hessian = A @ gram @ A.T
    target = U[:, kept]
    if correction:
        factor = torch.linalg.cholesky(damp(hessian, INVERSE_RIDGE))
        target = torch.cholesky_solve(A @ gram @ delta.double().T, factor).T
    if by_class:
        hessian = hessian * (bits[:, None] == bits[None, :])
    U_hat = gptq(target, hessian, bits[None, :])
    shape = (delta.shape[0], delta.shape[1])
    return Reconstruction((U_hat.double() @ A).float(), stored_bits(shape, bits.tolist()),
                          len(kept))
