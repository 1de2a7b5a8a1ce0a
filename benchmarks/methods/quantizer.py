"""The quantizer that the published methods share: groups of 128, asymmetric, min to max, and GPTQ.

What the public code of Delta-CoMe does (GPTQ, arXiv 2210.17323, with its usual options): 128
entries of a row have one 16-bit scale and one zero point of b bits, from the least to the largest
of them and 0; columns are quantized one after the other, those of the largest diagonal of H first
(act-order); the error of each is pushed to those still to come, H damped by 1 % of its mean
diagonal. Entries of different widths are never of one group: where U has components of several
widths, its groups start anew with each width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix.compression.hessian import damp, inverse_upper

GROUP = 128
SCALE_BITS = 16
DAMPING = 0.01
LEAST_SCALE = 2.0**-24  # of fp16


@dataclass(frozen=True)
class Grid:
    """Levels `scale · (code − zero)` of groups; scales are what fp16 holds of them."""

    scale: Tensor
    zero: Tensor
    top: Tensor  # 2^b − 1

    def round(self, values: Tensor) -> Tensor:
        """The nearest level of each value."""
        codes = (torch.round(values / self.scale) + self.zero).clamp_min(0.0)
        return self.scale * (torch.minimum(codes, self.top) - self.zero)


def fit(groups: Tensor, bits: Tensor) -> Grid:
    """The grid of each group `[..., entries]` from its least to its largest entry, 0 between."""
    top = 2.0 ** bits.float() - 1.0
    low, high = groups.amin(dim=-1).clamp_max(0.0), groups.amax(dim=-1).clamp_min(0.0)
    empty = low == high  # zeros alone
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = ((high - low) / top).half().float().clamp_min(LEAST_SCALE)
    return Grid(scale, torch.minimum(torch.round(-low / scale), top), top)


def gptq(weights: Tensor, hessian: Tensor, bits: Tensor) -> Tensor:
    """Weights `[m, n]` on their grids, with little tr(E H Eᵀ) (paper eq. 1); fp32.

    Args:
        weights: ΔW, V (rows are components) or U (columns are).
        hessian: H `[n, n]`, undamped.
        bits: `[m, 1]`, of each row, or `[1, n]`, of each column and falling.
    """
    hessian = damp(hessian.double(), DAMPING)
    falling = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    widths = bits.expand(1, weights.shape[1])[0] if bits.shape[0] == 1 else None
    order = falling if widths is None else falling[
        torch.argsort(widths[falling], descending=True, stable=True)]
    upper = inverse_upper(hessian, order)
    left = weights[:, order].float()
    levels = torch.empty_like(left)
    for begin, end in _blocks(left.shape[1], None if widths is None else widths[order]):
        block, factor = left[:, begin:end].clone(), upper[begin:end, begin:end]
        grid = fit(block, bits[:, 0] if widths is None else widths[order[begin]])
        errors = torch.empty_like(block)
        for j in range(end - begin):
            levels[:, begin + j] = grid.round(block[:, j])
            errors[:, j] = (block[:, j] - levels[:, begin + j]) / factor[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
        left[:, end:] -= errors @ upper[begin:end, end:]
    restored = torch.empty_like(levels)
    restored[:, order] = levels
    return restored


def _blocks(columns: int, widths: Tensor | None) -> Iterator[tuple[int, int]]:
    """Up to 128 neighbours of one width."""
    runs = [columns]
    if widths is not None:
        runs = torch.unique_consecutive(widths, return_counts=True)[1].tolist()
    begin = 0
    for run in runs:
        yield from ((at, min(at + GROUP, begin + run)) for at in range(begin, begin + run, GROUP))
        begin += run


def row_bits(length: int, bits: int) -> int:
    """A row of so many codes of one width, with the scale and the zero point of each group."""
    return length * bits + math.ceil(length / GROUP) * (SCALE_BITS + bits)


def group_index_bits(columns: int) -> int:
    """Act-order scatters a group over the row: of which one each column is, once a matrix."""
    return columns * (math.ceil(columns / GROUP) - 1).bit_length()
