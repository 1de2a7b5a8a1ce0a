"""Codes of a factor <-> its words, panel by panel, as drawn in `csrc/layout/packed_layout.h`.

A factor is V, with a lane a row, or U, with a lane a column; `counts` are the components at 8, 7,
.. 1 bits. Every full panel is of one shape, so all of them are packed at once, a width at a time;
the narrower last one follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adamix import ops


def pack_factor(codes: Tensor, counts: Sequence[int]) -> Tensor:
    """Codes uint8 ``[components, n]``, by width descending -> words int32 ``[words]``."""
    parts = [torch.empty(0, dtype=torch.int32)]
    for first, end, panels in _runs(codes.shape[1]):
        widths = [
            ops.pack(codes[lanes, first:end], bits=bits).view(lanes.stop - lanes.start, panels, -1)
            for bits, lanes in _lanes(counts)
        ]
        if widths:
            parts.append(torch.cat([w.transpose(0, 1).flatten(1) for w in widths], 1).flatten())
    return torch.cat(parts)


def unpack_factor(words: Tensor, counts: Sequence[int], n: int) -> Tensor:
    """The inverse: words int32 ``[words]`` -> codes uint8 ``[components, n]``."""
    codes = torch.empty(sum(counts), n, dtype=torch.uint8)
    begin = 0
    for first, end, panels in _runs(n):
        sizes = [(lanes.stop - lanes.start) * ops.lane_words(end - first, bits) // panels
                 for bits, lanes in _lanes(counts)]
        run = words[begin : begin + panels * sum(sizes)].view(panels, -1)
        begin += run.numel()
        for (bits, lanes), own in zip(_lanes(counts), run.split(sizes, 1), strict=True):
            count = lanes.stop - lanes.start
            blocks = own.reshape(panels, count, -1).transpose(0, 1).reshape(count, -1)
            codes[lanes, first:end] = ops.unpack(blocks, bits=bits, count=end - first)
    return codes


def _runs(n: int) -> Iterator[tuple[int, int, int]]:
    """(first code, end, panels): the full panels, then the last one."""
    full = n // ops.PANEL_CODES
    if full:
        yield 0, full * ops.PANEL_CODES, full
    if n % ops.PANEL_CODES:
        yield full * ops.PANEL_CODES, n, 1


def _lanes(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(bits, lanes at that width), widths in use only."""
    first = 0
    for k, count in enumerate(counts):
        if count:
            yield ops.MAX_BITS - k, slice(first, first + count)
        first += count
