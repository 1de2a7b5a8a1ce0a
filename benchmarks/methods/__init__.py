"""Methods of delta compression side by side, each a dense reconstruction and its size in bits.

One file a family; its first lines name the paper, what is stored, and what differs from it.
"""

from __future__ import annotations

from methods import (
    adamix_published,
    bitdelta,
    delta_come,
    delta_dct,
    delta_dq,
    group_gptq,
    impart,
    low_rank,
    ours,
    trellis_codes,
    ultradelta,
    vector_codes,
)
from methods.reconstruction import Method

# Fit to any budget.
METHODS: dict[str, Method] = {
    "this project": ours.preset_adamix,
    "this project, least error": ours.least_error,
    "this project, preset paper": ours.preset_paper,
    "trellis codes": trellis_codes.compress,
    "codes of four together": vector_codes.compress,
    "AdaMix, published": adamix_published.corrected,
    "AdaMix, no correction": adamix_published.uncorrected,
    "Delta-CoMe": delta_come.delta_come,
    "Top-2": delta_come.top_2,
    "Top-32": delta_come.top_32,
    "low rank, 16-bit": low_rank.compress,
    "ImPart": impart.compress,
    "Delta-DCT": delta_dct.compress,
    "UltraDelta": ultradelta.compress,
    "DeltaDQ": delta_dq.compress,
}
# Of one size, whatever the budget.
FIXED: dict[str, Method] = {
    "BitDelta": bitdelta.compress,
    "GPTQ of ΔW, 1 bit": group_gptq.one_bit,
    "GPTQ of ΔW, 2 bits": group_gptq.two_bits,
}
