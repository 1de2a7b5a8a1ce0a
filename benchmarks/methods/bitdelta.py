"""BitDelta (Liu et al., arXiv 2402.10193, section 3): α · sign(ΔW), α = mean |ΔW|.

α is the least-squares scale (their eq. 3). They train it further through the whole model, which a
matrix on its own does not allow: scale_distillation.py does. Stored: a sign a weight, one 16-bit
scale; one size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.reconstruction import Reconstruction


def compress(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    bits = delta.numel() + 16
    if bits > budget_bits:
        return None
    scale = delta.abs().mean().half().float()
    return Reconstruction(torch.where(delta >= 0, scale, -scale), bits)
