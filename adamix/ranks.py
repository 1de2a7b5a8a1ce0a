"""One compression by several processes ("ranks"), as torchrun starts them; or by one.

What is shared out: the checkpoints' tensors to look at, the chunks of text to sample, the groups of
chunks that calibrate, and the matrices to compress. What comes out never depends on the number of
ranks: sums are those of `calibration/sums.py`, all else is one tensor's or one matrix's own. So the
bytes are the same for any number. Rank 0 alone has the work folder and writes the output.

Who talks, and why nobody waits for ever:

- The main thread alone gathers objects and moves Gram matrices, by process groups of its own. The
  order follows from what all ranks know (layers, passes, owners, and which sums are there, which is
  gathered first), so all go through one list of operations, each between two ranks or all, and skip
  those of others. Of the operations that are not over, the first one's ranks have done all before
  it, so they are at it: it ends. On a GPU a move is queued only after that gathering, when each
  rank's sums are made: no kernel of NCCL spins while another rank is still computing.
- What bounds the order is the same on all: plans of memory and errors of "does not suit" are agreed
  upon before they are used. Jobs (threads that compress) wait for no other rank, so a main thread
  that waits for its jobs comes back.
- Results go to rank 0 by a third group: from one thread of each other rank, to one thread of rank 0
  that takes them from any source. A rank's end of a round is a message of its own.
- An error is put into torchrun's store by the rank that has it; the first one counts. Who gathers
  asks the store while it waits, as jobs and passes do between two steps; all ranks then raise that
  error, and rank 0 is waited for, since torchrun ends all processes once one has ended so. A rank
  in the middle of a move with one that failed is ended by a thread that watches the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from adamix.calibration.sums import ALONE, GROUPS, Share, Span, sums_at_once
from adamix.devices import Compute
from adamix.environment import is_launched, local_count
from adamix.parallel import available_cores

Value = TypeVar("Value")


class Loads:
    """Spreads work over ranks, the heaviest first, each to who has least: the same on all ranks."""

    def __init__(self, count: int) -> None:
        self._loads = [0.0] * count

    def spread(self, costs: Sequence[float]) -> list[int]:
        """The rank of each piece, on top of what was spread before."""
        ranks = [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
            ranks[index] = self._loads.index(min(self._loads))
            self._loads[ranks[index]] += costs[index]
        return ranks


class Ranks:
    """The only process of a compression."""

    rank, count = 0, 1

    @property
    def cores(self) -> int:
        """That this process is to use, if nothing else is said."""
        return max(1, available_cores() // local_count())

    @property
    def is_main(self) -> bool:
        """Whether this one has the work folder."""
        return self.rank == 0

    def device(self, asked: str | torch.device | None) -> str | torch.device | None:
        """What stands for the device that a user asked for."""
        return asked

    def use(self, compute: Compute) -> None:
        """All ranks compute on this."""

    def check(self) -> None:
        """Raise what ended another rank."""

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value."""
        return [value]

    def main(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes."""
        return self.gather(make() if self.is_main else None)[0]

    def mine(self, sizes: Sequence[float]) -> list[int]:
        """Which of some pieces of work are this rank's, by number."""
        owners = Loads(self.count).spread(sizes)
        return [index for index, owner in enumerate(owners) if owner == self.rank]

    def settle(self) -> None:
        """What this thread has put on a GPU is done."""

    def move(self, matrix: Tensor | None, width: int, source: int, target: int) -> Tensor | None:
        """A matrix `[width, width]` fp32 of one rank in another; None in all others."""
        return matrix

    def share(self, owners: Mapping[str, int]) -> Share:
        """This rank's part of a calibration: of its chunks, and of the layers {name: rank}."""
        return ALONE

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """An error in the block on one rank is raised on all."""
        yield

    @contextmanager
    def results(self, take: Callable[[Value], None]) -> Iterator[Callable[[Value], None]]:
        """What is told in the block on another rank is taken on rank 0, in a thread; at its end
        everything is. Yields what tells."""
        yield lambda value: None


class Part:
    """A rank's share of a calibration."""

    def __init__(self, ranks: Ranks, owners: Mapping[str, int]) -> None:
        self._ranks, self._owners = ranks, owners
        runs = [range(GROUPS * rank // ranks.count, GROUPS * (rank + 1) // ranks.count)
                for rank in range(ranks.count)]
        self.groups = runs[ranks.rank]
        self.at_once = max(map(sums_at_once, runs))
        self._rank_of = [rank for rank, run in enumerate(runs) for _ in run]

    def check(self) -> None:
        self._ranks.check()

    def is_mine(self, name: str) -> bool:
        return self._owners[name] == self._ranks.rank

    def combine(self, widths: Mapping[str, int], sums: dict[str, dict[Span, Tensor]],
                counts: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, int]]:
        self._ranks.settle()
        told = self._ranks.gather({name: (list(nodes), counts[name])
                                   for name, nodes in sums.items()})
        mine, totals = {}, {}
        for name, width in widths.items():
            parts = [of_rank[name] for of_rank in told if name in of_rank]
            if not parts:
                continue
            totals[name] = sum(count for _, count in parts)
            there = {span for spans, _ in parts for span in spans}
            total = self._total(sums.pop(name, {}), there, width, self._owners[name])
            if total is not None:
                mine[name] = total
        self._ranks.settle()
        return mine, totals

    def hand_over(self, gram: Tensor | None, width: int, name: str, to: str) -> Tensor | None:
        return self._ranks.move(gram, width, self._owners[name], self._owners[to])

    @torch.inference_mode()
    def _total(self, here: dict[Span, Tensor], there: set[Span], width: int, owner: int
               ) -> Tensor | None:
        """The tree's root at the owner. A node is made at the owner if that has a part of it, else
        where its left part is: at most one matrix more than its own is in a rank's memory.

        Args:
            here: nodes of this rank; emptied.
            there: nodes of any rank.
        """
        def node(first: int, stop: int) -> tuple[int, Tensor | None] | None:
            """Its rank, and in that one its sum; None where it has none."""
            rank = self._rank_of[first]
            if rank == self._rank_of[stop - 1]:
                return (rank, here.pop((first, stop), None)) if (first, stop) in there else None
            middle = (first + stop) // 2
            left, right = node(first, middle), node(middle, stop)
            if left is None or right is None:
                return left or right
            at, other = (right, left) if right[0] == owner else (left, right)
            moved = self._ranks.move(other[1], width, other[0], at[0])
            return at[0], None if at[1] is None else at[1].add_(moved)

        root = node(0, GROUPS)
        return None if root is None else self._ranks.move(root[1], width, root[0], owner)


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks of this compression: those that torchrun started, or this process alone.

    Raises:
        AdamixError: the first error of any rank, on all of them.
    """
    if not is_launched():
        yield Ranks()
        return
    from adamix.torchrun import Launched  # a process of its own needs nothing of it

    ranks = Launched()
    try:
        with ranks.as_one():
            yield ranks
    except BaseException:
        ranks.part()
        raise
    ranks.close()
