"""Sums over all chunks of tokens that have the same bits however many processes made them.

The chunks are cut into GROUPS contiguous groups, whatever the number of processes. A group's chunks
are added in their order, and the groups' sums by one binary tree:

    ((g0 + g1) + (g2 + g3)) + ((g4 + g5) + (g6 + g7))

A node of it is a span of groups (first, end). A process that has a contiguous run of groups makes
the nodes that lie in it; who puts the others together changes no bit. A node to which no chunk
added anything is not there, and adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

GROUPS = 8
Span = tuple[int, int]


def group_of(chunk: int, chunks: int) -> int:
    """The group of a chunk, by its number."""
    return ((chunk + 1) * GROUPS - 1) // chunks


def chunks_of(groups: range, chunks: int) -> range:
    """The numbers of a run of groups' chunks."""
    return range(groups.start * chunks // GROUPS, groups.stop * chunks // GROUPS)


class TreeSum:
    """What a process adds up of one matrix, over the chunks of its groups, in order.

    Of all 8 groups 4 sums are alive at most: (0, 4), (4, 6), (6, 7) and (7, 8).
    """

    def __init__(self, groups: range) -> None:
        self._groups = groups
        self._nodes: list[tuple[Span, Tensor]] = []

    @torch.inference_mode()
    def add(self, group: int, part: Tensor) -> None:
        """Take in what the next chunk has; the tensor becomes this object's own."""
        if self._nodes and self._nodes[-1][0] == (group, group + 1):
            self._nodes[-1][1].add_(part)
            return
        self._close(group)
        self._nodes.append(((group, group + 1), part))

    def reopen(self, group: int) -> Tensor | None:
        """A group's sum, to be added to and taken in again; None where it has none yet."""
        if self._nodes and self._nodes[-1][0] == (group, group + 1):
            return self._nodes.pop()[1]
        return None

    @torch.inference_mode()
    def take(self) -> dict[Span, Tensor]:
        """The largest nodes, once all chunks are in; this object lets go of them."""
        self._close(self._groups.stop)
        nodes, self._nodes = dict(self._nodes), []
        return nodes

    def _close(self, end: int) -> None:
        """All groups before `end` are in: put together what makes whole nodes."""
        while self._nodes:
            (first, stop), total = self._nodes[-1]
            size = 2 * (stop - first)
            start = first // size * size
            if start < self._groups.start or start + size > end:
                return
            self._nodes.pop()
            if self._nodes and self._nodes[-1][0][0] >= start:  # the other half
                total = self._nodes.pop()[1].add_(total)
            self._nodes.append(((start, start + size), total))


def sums_at_once(groups: range) -> int:
    """Sums of one matrix that are alive at a time, at most, in a process with these groups."""
    found, most = TreeSum(groups), 0
    for group in groups:
        found.add(group, torch.zeros(()))
        most = max(most, len(found._nodes))
    return most


class Share(Protocol):
    """One process's part of a calibration: its chunks, and who gets which sum."""

    groups: range  # of GROUPS
    at_once: int  # sums of one matrix that are alive at a time, at most, in any process

    def check(self) -> None:
        """Raise what ended another process."""

    def is_mine(self, name: str) -> bool:
        """Whether this process uses a layer's Gram matrix."""

    def combine(self, widths: Mapping[str, int], sums: dict[str, dict[Span, Tensor]],
                counts: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The sums over all processes of those layers that are this one's, and all layers' counts;
        those that nothing entered are not there. Every process calls it for the same layers.

        Args:
            widths: {layer: inputs} of all that were looked at.
            sums: of this process, by layer; emptied.
            counts: tokens that this process's chunks had for each layer.
        """

    def hand_over(self, gram: Tensor | None, width: int, name: str, to: str) -> Tensor | None:
        """The matrix of the process that has layer `name`'s in the one that has `to`'s; None in
        all others. Every process calls it."""


class Alone:
    """The share of a process that is the only one: everything."""

    groups = range(GROUPS)
    at_once = sums_at_once(groups)

    def check(self) -> None:
        pass

    def is_mine(self, name: str) -> bool:
        return True

    def combine(self, widths: Mapping[str, int], sums: dict[str, dict[Span, Tensor]],
                counts: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, int]]:
        return {name: sums.pop(name)[0, GROUPS] for name in widths if name in sums}, dict(counts)

    def hand_over(self, gram: Tensor | None, width: int, name: str, to: str) -> Tensor | None:
        return gram


ALONE = Alone()
