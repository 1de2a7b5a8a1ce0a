"""Fixed widths by rank: Delta-CoMe and the two heuristics that the paper compares with.

Delta-CoMe (arXiv 2406.08903; its public code's options): 2 components at 8 bits, 32 at 3, the rest
at 2 as far as the budget goes, of the plain SVD of ΔW; V, then U against U Σ V̂ X (paper eq. 6, no
correction), each width on its own. Top-2 and Top-32 (paper section 4.3): so many at 8 bits, the
rest at 2. Storage: components.py.
"""

from __future__ import annotations

from torch import Tensor

from methods.components import quantize_components, stored_bits
from methods.reconstruction import Reconstruction

DELTA_COME = ((8, 2), (3, 32))
REST = 2  # bits


def delta_come(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction:
    return _fixed(delta, gram, budget_bits, DELTA_COME)


def top_2(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction:
    return _fixed(delta, gram, budget_bits, ((8, 2),))


def top_32(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction:
    return _fixed(delta, gram, budget_bits, ((8, 32),))


def fixed_widths(shape: tuple[int, int], budget_bits: int, first: tuple[tuple[int, int], ...]
                 ) -> list[int]:
    """The widths of as many leading components as the budget pays for."""
    wanted = [bits for bits, count in first for _ in range(count)]
    wanted += [REST] * max(min(shape) - len(wanted), 0)
    low, high = 0, min(len(wanted), min(shape))
    while low < high:
        middle = (low + high + 1) // 2
        fits = stored_bits(shape, wanted[:middle]) <= budget_bits
        low, high = (middle, high) if fits else (low, middle - 1)
    return wanted[:low]


def _fixed(delta: Tensor, gram: Tensor, budget_bits: int, first: tuple[tuple[int, int], ...]
           ) -> Reconstruction:
    shape = (delta.shape[0], delta.shape[1])
    widths = dict(enumerate(fixed_widths(shape, budget_bits, first)))
    return quantize_components(delta, gram, widths, correction=False, by_class=True)
