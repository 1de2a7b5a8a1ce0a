"""What rivals/bitdelta.py computes, in plain torch: it is checked against this, then timed."""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = 16  # of a group: the inner size of one matrix instruction
GROUP = 32 * WORDS  # inputs


def pack_signs(signs: Tensor) -> Tensor:
    """Words int32 [models, in / 32, out] of signs ±1 [models, in, out]."""
    models, inputs, out = signs.shape
    bits = (signs > 0).view(models, inputs // GROUP, 32, WORDS, out).long()
    weights = (1 << torch.arange(32, device=signs.device)).view(1, 1, 32, 1, 1)
    words = (bits * weights).sum(2)  # 0 .. 2^32 - 1
    return (words - (words >> 31 << 32)).to(torch.int32).view(models, inputs // 32, out)


def signs_of(words: Tensor) -> Tensor:
    """±1 fp32 [models, in, out]: bit j of word w of a group is input 16 j + w, set for +1."""
    models, count, out = words.shape
    grouped = words.view(models, count // WORDS, 1, WORDS, out)
    shifts = torch.arange(32, dtype=torch.int32, device=words.device).view(1, 1, 32, 1, 1)
    return ((grouped >> shifts & 1) * 2 - 1).reshape(models, count * 32, out).float()


def sign_product(x: Tensor, words: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
    """y + α · x · sign in fp32; x [models, tokens, in], y [models, tokens, out]."""
    return y.float() + alpha.view(-1, 1, 1) * (x.float() @ signs_of(words))
