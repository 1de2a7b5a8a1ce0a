"""GPTQ of ΔW itself, groups of 128 inputs (quantizer.py), at 1 and at 2 bits.

The low-bit baseline of the papers (GPT-Zip, DeltaZip start from it). Stored: codes, a 16-bit scale
and a b-bit zero point a group, which group each input is of; one size for each width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.quantizer import gptq, group_index_bits, row_bits
from methods.reconstruction import Reconstruction


def one_bit(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    return _at(1, delta, gram, budget_bits)


def two_bits(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    return _at(2, delta, gram, budget_bits)


def _at(bits: int, delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    rows, columns = delta.shape
    stored = rows * row_bits(columns, bits) + group_index_bits(columns)
    if stored > budget_bits:
        return None
    return Reconstruction(gptq(delta, gram, torch.full((rows, 1), bits)), stored)
