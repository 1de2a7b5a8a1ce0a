"""QuantizedDelta -> PackedDelta."""

from __future__ import annotations

import torch

from adamix import ops
from adamix.artifacts import PackedDelta, QuantizedDelta


def pack(delta: QuantizedDelta) -> PackedDelta:
    """Pack the codes of V̂'s rows, then those of Û's columns, a segment a width.

    Raises:
        ValueError: the components are not sorted by width descending.
    """
    if (delta.bits.diff() > 0).any():
        raise ValueError(
            f"components must be sorted by width descending, got {delta.bits.tolist()}")
    counts = torch.bincount(delta.bits.long(), minlength=ops.MAX_BITS + 1)[1:].flip(0).tolist()
    segments = []
    for codes in (delta.V_codes, delta.U_codes):
        first = 0
        for k, count in enumerate(counts):
            if count:
                lanes = codes[first : first + count]
                segments.append(ops.pack(lanes, bits=ops.MAX_BITS - k).flatten())
            first += count
    words = torch.cat(segments) if segments else torch.empty(0, dtype=torch.int32)
    shape = (delta.U_codes.shape[1], delta.V_codes.shape[1])
    return PackedDelta(words, delta.scales, tuple(counts), shape)
