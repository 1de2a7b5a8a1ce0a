"""Trellis codes: which of several tables a number is rounded by hangs on one bit of each of the
numbers before it, so that few bits reach many levels.

A block of 32 codes of b bits has b words. One of them, T, holds a bit t_i of every code; the other
b - 1 bits of a code are its own. Code i stands for `levels[window, own]`, a small whole number:

    window_i = t_i · 2^v + t_{i-1} · 2^(v-1) + .. + t_{i-v}        i - 1 of code 0 is code 31

which is v + 1 adjacent bits of T turned around: blocks need nothing of each other, and a code takes
b bits as ever. The words of a block with the least error are found by Viterbi's algorithm.

Marcellin and Fischer, "Trellis coded quantization", 1990: the search, and tables of sets of levels.
Tseng, Sun, Hou and De Sa, "QTIP", 2024: windows of a bit string, tables without any structure.
Shao, Lin and Fossorier, "Two decoding algorithms for tailbiting codes", 2003: the search around.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

TABLES = Path(__file__).with_name("trellis.safetensors")
STEPS = 32  # codes of a block
AROUND, TRIED = 2, 4  # searches that look for the state of a block's two ends; states tried
OPEN, BARRED = 1e15, 1e30  # costs above all others
ROOM = 2**17  # numbers of all states at a time: what is made of them stays in a core's cache


@dataclass(frozen=True)
class Trellis:
    levels: Tensor  # [2^(v+1), 2^(b-1)] fp32, every row ascending
    unit: float  # what a standard deviation of 1 is in the levels' unit

    @property
    def states(self) -> int:
        return self.levels.shape[0] // 2

    @property
    def memory(self) -> int:
        """v"""
        return self.states.bit_length() - 1

    def values(self, codes: Tensor) -> Tensor:
        return self.levels.view(-1)[codes]


@cache
def tables() -> dict[int, Trellis]:
    """The trellis of each width that has one; levels are whole numbers in a byte."""
    stored = load_file(TABLES)
    return {int(name): Trellis(levels.float(), stored[f"unit.{name}"].item())
            for name, levels in stored.items() if name.isdigit()}


# --- blocks --------------------------------------------------------------------------------------


def pack(trellis: Trellis, codes: Tensor) -> Tensor:
    """The words of blocks of codes `[m, 32]`, int64 `[m, b]`: T, then a word for each bit that
    codes have of their own, code i at bit i."""
    own = trellis.levels.shape[1]
    planes = [codes // own >> trellis.memory]
    planes += [codes % own >> j & 1 for j in range(own.bit_length() - 1)]
    return torch.stack(planes, dim=1) @ (1 << torch.arange(STEPS))


def unpack(trellis: Trellis, words: Tensor) -> Tensor:
    """The codes `[m, 32]` of blocks' words, as a kernel reads them."""
    v, places = trellis.memory, torch.arange(STEPS)
    T = words[:, :1]
    back = (places - v) % STEPS  # T turned right by i - v has a code's window at its low end
    windows = (T >> back | T << STEPS - back) & (2 << v) - 1
    own = sum((words[:, 1 + j, None] >> places & 1) << j for j in range(words.shape[1] - 1))
    return windows * trellis.levels.shape[1] + own


# --- search --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """The best path into every state, `[states, m]`, and how to go back along it."""

    cost: Tensor
    origin: Tensor  # the state that it began in
    odd: Tensor  # [steps, states, m] bool, which of two predecessors
    level: Tensor  # [steps, states, m]


def search(trellis: Trellis, targets: Tensor, upper: Tensor | None = None) -> Tensor:
    """The codes of the blocks nearest to `[m, 32]` targets, a block a row, int64.

    A code is its window times 2^(b-1), and the bits that are its own.

    Args:
        trellis: its levels.
        targets: in the levels' unit.
        upper: the upper Cholesky factor of H⁻¹ for the block's 32 inputs; with it every path has
            GPTQ's feedback of its own errors, and the error is that under H. None for no feedback.
    """
    part = max(1, ROOM // trellis.states // (STEPS if upper is not None else 4))
    return torch.cat([_search(trellis, some.T.contiguous(), upper) for some in targets.split(part)])


def _search(trellis: Trellis, targets: Tensor, upper: Tensor | None) -> Tensor:
    """Two searches with any states at the ends, the second from the costs that the first ended
    with, rank the states: first those whose path began where it ends. Both ends are then held at
    each of the best few in turn."""
    S, m = trellis.states, targets.shape[1]
    start, ranks = torch.zeros(S, m), torch.full((S, m), OPEN)
    for _ in range(AROUND):
        found = paths(trellis, targets, start, upper)
        closed = found.origin == torch.arange(S)[:, None]
        net = torch.where(closed, found.cost - start.gather(0, found.origin), OPEN)
        ranks, start = torch.minimum(ranks, net), found.cost - found.cost.min(dim=0).values
    ranks = torch.where(ranks < OPEN, ranks, OPEN * (1.0 + start))
    least, result = torch.full((m,), BARRED), torch.zeros_like(targets, dtype=torch.long)
    for both in ranks.topk(min(TRIED, S), dim=0, largest=False).indices:
        start = torch.full((S, m), BARRED).scatter_(0, both[None], 0.0)
        found = paths(trellis, targets, start, upper)
        cost = found.cost.gather(0, both[None])[0]
        result = torch.where(cost < least, back(trellis, found, both), result)
        least = torch.minimum(least, cost)
    return result.T


def paths(trellis: Trellis, targets: Tensor, start: Tensor, upper: Tensor | None = None) -> Paths:
    """Viterbi's algorithm on `[steps, m]` targets from costs of the states `[states, m]`.

    A state is the v bits before a code, the last one its highest bit. Into state n lead the
    windows 2n and 2n + 1, out of the states that are their lower v bits.
    """
    steps, m = targets.shape
    S = trellis.states
    cost, origin = start, torch.arange(S)[:, None].expand(S, m)
    odds = torch.empty(steps, S, m, dtype=torch.bool)
    levels = torch.empty(steps, S, m)
    lost = torch.empty(steps, S, m) if upper is not None else None
    for i in range(steps):
        aim = targets[i].expand(S, m)
        if upper is not None and i > 0:
            aim = aim - (upper[:i, i] @ lost[:i].view(i, -1)).view(S, m)
        level = _nearest(trellis, aim)
        error = aim - level
        if upper is not None:
            error = error / upper[i, i]
        into = (cost + error.square()).view(S, 2, m)
        odd = into[:, 1] < into[:, 0]
        cost = torch.where(odd, into[:, 1], into[:, 0])
        origin = _survivors(origin, odd)
        odds[i], levels[i] = odd, _chosen(level, odd)
        if lost is not None:
            lost[:i] = _survivors(lost[:i], odd)
            lost[i] = _chosen(error, odd)
    return Paths(cost, origin, odds, levels)


def _nearest(trellis: Trellis, aim: Tensor) -> Tensor:
    """The nearest level of each window `[2, states, m]` to what its state aims at."""
    of = trellis.levels.view(2, *aim.shape[:1], -1, 1)
    nearest = of[:, :, 0].expand(2, *aim.shape)
    for k in range(1, of.shape[2]):
        middle = 0.5 * (of[:, :, k - 1] + of[:, :, k])
        nearest = torch.where(aim > middle, of[:, :, k], nearest)
    return nearest


def _chosen(of_windows: Tensor, odd: Tensor) -> Tensor:
    pairs = of_windows.reshape(*odd.shape[:1], 2, -1)
    return torch.where(odd, pairs[:, 1], pairs[:, 0])


def _survivors(of_states: Tensor, odd: Tensor) -> Tensor:
    """What the chosen predecessor of each state has, `[.., states, m]`: states n and n + S/2 share
    the predecessors 2n and 2n + 1."""
    S, m = odd.shape
    pairs = of_states.reshape(-1, 1, S // 2, 2, m)
    return torch.where(odd.view(2, S // 2, m), pairs[..., 1, :], pairs[..., 0, :]
                       ).view(of_states.shape)


def back(trellis: Trellis, found: Paths, end: Tensor) -> Tensor:
    """The codes `[steps, m]` along the paths into the states `[m]`."""
    state, codes = end, torch.empty(found.level.shape[0], len(end), dtype=torch.long)
    for i in range(len(codes) - 1, -1, -1):
        window = 2 * state + found.odd[i].gather(0, state[None])[0]
        level = found.level[i].gather(0, state[None])[0]
        own = (trellis.levels[window] == level[:, None]).float().argmax(dim=1)
        codes[i] = window * trellis.levels.shape[1] + own
        state = window % trellis.states
    return codes
