"""Codes of a factor <-> its words, panel by panel, as drawn in `csrc/layout/packed_layout.h`.

A factor is V, with a lane a row, or U, with a lane a column; `counts` are its lanes at 8, 7, .. 1
bits. Every full panel is of one shape, so all of them are packed at once, a width at a time;
the narrower last one follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adamix import ops


def pack_factor(codes: Tensor, counts: Sequence[int]) -> Tensor:
    """Codes uint8 ``[lanes, n]``, by width descending -> words int32 ``[words]``."""
    parts = [torch.empty(0, dtype=torch.int32, device=codes.device)]
    for first, end, panels in _runs(codes.shape[1]):
        widths = [
            ops.pack(codes[lanes, first:end], bits=bits).view(lanes.stop - lanes.start, panels, -1)
            for bits, lanes in _lanes(counts)
        ]
        if widths:
            parts.append(torch.cat([w.transpose(0, 1).flatten(1) for w in widths], 1).flatten())
    return torch.cat(parts)


def unpack_factor(words: Tensor, counts: Sequence[int], n: int) -> Tensor:
    """The inverse: words int32 ``[words]`` -> codes uint8 ``[lanes, n]``."""
    codes = torch.empty(sum(counts), n, dtype=torch.uint8, device=words.device)
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


def slice_factor(words: Tensor, counts: Sequence[int], n: int, begin: int, end: int) -> Tensor:
    """The words of codes ``begin..end-1`` of every lane, as :func:`pack_factor` would pack them.

    ``words`` int32 ``[words]`` of lanes of ``n`` codes. From a panel to a panel, or to the end,
    the result is a view; from a block to a block a copy of whole words; elsewhere the codes are
    packed anew.

    Raises:
        ValueError: the codes are not among the ``n``, or the words are not so many.
    """
    if not 0 <= begin <= end <= n:
        raise ValueError(f"codes {begin}..{end - 1} are no slice of {n}")
    if words.shape != (ops.v_words(n, counts),):
        raise ValueError(f"lanes of {n} codes have {ops.v_words(n, counts)} words, got "
                         f"{list(words.shape)}")
    if begin % ops.PANEL_CODES == 0 and (end % ops.PANEL_CODES == 0 or end == n):
        return words[ops.v_words(begin, counts) :][: ops.v_words(end - begin, counts)]
    if begin % ops.BLOCK_CODES or (end % ops.BLOCK_CODES and end != n):
        return pack_factor(unpack_factor(words, counts, n)[:, begin:end], counts)
    first, last = begin // ops.BLOCK_CODES, -(-end // ops.BLOCK_CODES)
    return _join_panels([lanes[:, first:last] for lanes in _split_panels(words, counts, n)])


def _split_panels(words: Tensor, counts: Sequence[int], n: int) -> list[Tensor]:
    """For each width in use its lanes' words, ``[lanes, blocks, bits]``."""
    parts: list[list[Tensor]] = [[] for _ in _lanes(counts)]
    for first, end, panels in _runs(n):
        blocks = ops.lane_words(end - first, 1)
        run = words[ops.v_words(first, counts) : ops.v_words(end, counts)].view(panels, -1)
        sizes = [(lanes.stop - lanes.start) * blocks // panels * bits
                 for bits, lanes in _lanes(counts)]
        for part, own, (bits, lanes) in zip(parts, run.split(sizes, 1), _lanes(counts),
                                            strict=True):
            count = lanes.stop - lanes.start
            part.append(own.reshape(panels, count, -1).transpose(0, 1).reshape(count, -1, bits))
    return [torch.cat(part, 1) for part in parts]


def _join_panels(widths: Sequence[Tensor]) -> Tensor:
    """The inverse."""
    per_panel = ops.PANEL_CODES // ops.BLOCK_CODES
    blocks = widths[0].shape[1] if widths else 0
    panels = [torch.cat([lanes[:, first : first + per_panel].flatten() for lanes in widths])
              for first in range(0, blocks, per_panel)]
    return torch.cat([torch.empty(0, dtype=torch.int32), *panels])


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
