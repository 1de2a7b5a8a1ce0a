"""What a method hands back: the matrix that would be served, and what it takes on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Δ̂ and its size.

    `bits` is all that would be stored: codes, scales, zero points, indices, signs. `rank` is 0
    where a method has no components.
    """

    dense: Tensor  # [out, in] fp32
    bits: int
    rank: int = 0


class Method(Protocol):
    def __call__(self, delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
        """Compress one matrix.

        Args:
            delta: ΔW `[out, in]` fp32.
            gram: X Xᵀ `[in, in]` of the calibration inputs, undamped.
            budget_bits: the most that everything together may take.

        Returns:
            None where the method has no size so small.
        """
