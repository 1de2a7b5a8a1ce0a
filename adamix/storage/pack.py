"""QuantizedDelta -> PackedDelta."""

from __future__ import annotations

import torch
from torch import Tensor

from adamix import ops
from adamix.artifacts import PackedDelta, QuantizedDelta
from adamix.panels import pack_factor


def pack(delta: QuantizedDelta) -> PackedDelta:
    """Pack the codes of V̂'s rows, then those of Û's columns.

    Raises:
        ValueError: the components are not sorted by width descending, in V as in U.
    """
    v_counts, u_counts = _counts(delta.v_bits, "V"), _counts(delta.u_bits, "U")
    words = torch.cat([pack_factor(delta.V_codes, v_counts), pack_factor(delta.U_codes, u_counts)])
    shape = (delta.U_codes.shape[1], delta.V_codes.shape[1])
    return PackedDelta(words, delta.scales, v_counts, u_counts, shape)


def _counts(bits: Tensor, factor: str) -> tuple[int, ...]:
    """Lanes at 8, 7, .. 1 bits."""
    if (bits.diff() > 0).any():
        raise ValueError(f"components must be sorted by width descending, got {bits.tolist()} "
                         f"bits in {factor}")
    return tuple(torch.bincount(bits.long(), minlength=ops.MAX_BITS + 1)[1:].flip(0).tolist())
