"""GPTQ (Frantar et al. 2022, algorithm 1) as a plain loop of torch calls, blocks of 128 columns."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def gptq_loop(weight: Tensor, hinv: Tensor, bits: int, scales: Tensor) -> Tensor:
    """Codes uint8 of weight fp32 [rows, n] at one width; scales fp32, one a row."""
    weight = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    columns, half, top = weight.shape[1], 2 ** (bits - 1), 2**bits - 1
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        block = weight[:, begin:end]
        errors = torch.empty_like(block)
        factor = hinv[begin:end, begin:end]
        for j in range(end - begin):
            code = torch.clamp(torch.floor(block[:, j] / (2 * scales)) + half, 0, top)
            codes[:, begin + j] = code
            error = (block[:, j] - scales * (2 * code - top)) / factor[j, j]
            block[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
            errors[:, j] = error
        weight[:, end:] -= errors @ hinv[begin:end, end:]
    return codes
