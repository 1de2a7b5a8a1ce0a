"""The part of a packed delta that one worker of a tensor-parallel engine computes with."""

from __future__ import annotations

import torch
from torch import Tensor

from adamix import ops
from adamix.artifacts import PackedDelta
from adamix.panels import pack_factor, slice_factor, unpack_factor


def part_of(packed: PackedDelta, rows: Tensor, columns: Tensor) -> PackedDelta:
    """The delta's rows and columns with these numbers, int64, in that order.

    Rows are cut from U, columns from V; the scales stay, so parts beside each other are the whole
    and parts on top of each other add up to it. Where the numbers follow each other, whole panels
    are views, whole blocks copies of words; else codes are packed anew.
    """
    out, n = packed.shape
    v_words = ops.v_words(n, packed.v_counts)
    V = _part(packed.words[:v_words], packed.v_counts, n, columns)
    U = _part(packed.words[v_words:], packed.u_counts, out, rows)
    return PackedDelta(torch.cat([V, U]), packed.scales, packed.v_counts, packed.u_counts,
                       (rows.numel(), columns.numel()))


def _part(words: Tensor, counts: tuple[int, ...], n: int, kept: Tensor) -> Tensor:
    if kept.numel() == 0:
        return words[:0]
    begin, end = int(kept[0]), int(kept[-1]) + 1
    if torch.equal(kept, torch.arange(begin, end)):
        return slice_factor(words, counts, n, begin, end)
    return pack_factor(unpack_factor(words, counts, n)[:, kept], counts)
