"""The pairs of widths that a component may get: of its row of V, and of its column of U."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adamix.config import Config

OFFSETS = range(-3, 3)  # by which U is wider than V; 18944 x 3584 and its transpose want -1 and 2

Pair = tuple[int, int]  # bits of the row of V, bits of the column of U


def sets_of_pairs(config: Config) -> list[tuple[Pair, ...]]:
    """Sets of pairs, of which the components of one matrix use one."""
    if config.separate_widths and config.objective == "v+u":
        return chains(config.bit_widths)
    return [equal_pairs(config.bit_widths)]


def union(sets: Iterable[Iterable[Pair]]) -> list[Pair]:
    """All pairs, widest first."""
    return sorted(set().union(*sets), reverse=True)


def columns(sets: Sequence[Iterable[Pair]]) -> list[list[int]] | None:
    """The sets as columns of errors at `union(sets)` and, last, at 0 bits, which all have; None for
    a single set."""
    pairs = union(sets)
    if len(sets) == 1:
        return None
    return [[*map(pairs.index, chosen), len(pairs)] for chosen in sets]


def equal_pairs(widths: Sequence[int]) -> tuple[Pair, ...]:
    """The pairs (b, b), widest first."""
    return tuple((b, b) for b in sorted(widths, reverse=True))


def chains(widths: Sequence[int]) -> list[tuple[Pair, ...]]:
    """Sets of pairs that one matrix may use together, widest first, each set once.

    In the packed order neither V's widths nor U's rise, so of two pairs in use none may have more
    bits in V and fewer in U: a chain. With V's and U's places p and q in the sorted widths, a chain
    has the pairs with q − p in {d, d + 1} for one offset d, and the steps that lead from them to
    the narrowest and to the widest pair.
    """
    ascending = sorted(widths)
    last = len(ascending) - 1

    def chain(offset: int) -> tuple[Pair, ...]:
        pairs = []
        for p, v in enumerate(ascending):
            low = 0 if p == 0 else min(max(p + offset, 0), last)
            high = last if p == last else min(max(p + offset + 1, 0), last)
            pairs += [(v, u) for u in ascending[low:high + 1]]
        return tuple(reversed(pairs))

    return list(dict.fromkeys(map(chain, OFFSETS)))
