"""QuantizedDelta -> PackedDelta."""

from __future__ import annotations

import torch

from adamix import ops
from adamix.artifacts import PackedDelta, QuantizedDelta
from adamix.panels import pack_factor


def pack(delta: QuantizedDelta) -> PackedDelta:
    """Pack the codes of V̂'s rows, then those of Û's columns.

    Raises:
        ValueError: the components are not sorted by width descending.
    """
    if (delta.bits.diff() > 0).any():
        raise ValueError(
            f"components must be sorted by width descending, got {delta.bits.tolist()}")
    counts = torch.bincount(delta.bits.long(), minlength=ops.MAX_BITS + 1)[1:].flip(0).tolist()
    words = torch.cat([pack_factor(codes, counts) for codes in (delta.V_codes, delta.U_codes)])
    shape = (delta.U_codes.shape[1], delta.V_codes.shape[1])
    return PackedDelta(words, delta.scales, tuple(counts), shape)
