"""Low rank: the leading components of the SVD of ΔW in 16 bits (Ryu et al., arXiv 2305.18425).

Stored: U diag(s) and V in fp16, 16 bits an entry; nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.reconstruction import Reconstruction

ENTRY_BITS = 16


def compress(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction:
    component = ENTRY_BITS * sum(delta.shape)
    rank = min(budget_bits // component, *delta.shape)
    U, s, V = torch.linalg.svd(delta.double(), full_matrices=False)
    left, right = (U[:, :rank] * s[:rank]).half(), V[:rank].half()
    return Reconstruction((left.double() @ right.double()).float(), rank * component, rank)
