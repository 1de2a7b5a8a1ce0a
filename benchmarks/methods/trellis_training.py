"""The tables of `trellis.py`, trained on a Gaussian sample and rounded to bytes.

    python -m methods.trellis_training    # in benchmarks/: trains them anew, prints their errors

First 2^(b+1) levels in four sets, every fourth level in one: which set a window has is Ungerboeck's
choice ("Channel coding with multilevel/phase signals", 1982). Lloyd's algorithm through the trellis
then moves the levels, and after that those of each window by themselves.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor

from methods.trellis import STEPS, TABLES, Trellis, back, paths, search, tables

MEMORY = {2: 6, 3: 5, 4: 4, 5: 3}  # v of each width b: every table has 2^(b+v) = 256 bytes
CHECKS = {2: (0o2, 0o5), 3: (0o4, 0o13), 4: (0o4, 0o23), 5: (0o10, 0o45), 6: (0o24, 0o103),
          7: (0o126, 0o235), 8: (0o362, 0o515)}  # Ungerboeck's polynomials for 2^v states
SPREAD = {1: 1.2, 2: 1.9, 3: 2.3, 4: 2.6, 5: 2.8}  # the outermost level, in deviations
TOGETHER, APART = 12, 40  # rounds
LONG, SAMPLES = 256, 128  # numbers of a path, and paths of a round
INERTIA = 2.0  # numbers that a level's last value stands for
LARGEST = 127


def train(bits: int, memory: int, seed: int = 0) -> Trellis:
    """Levels are whole numbers of at most 127."""
    generator = torch.Generator().manual_seed(seed)
    sets = _sets(memory)
    uniform = torch.linspace(-SPREAD[bits], SPREAD[bits], 2 ** (bits + 1)).view(-1, 4).T
    trellis = Trellis(uniform[sets].contiguous(), 1.0)
    for _ in range(TOGETHER):
        trellis = _lloyd(trellis, sets, generator)
    for _ in range(APART):
        trellis = _lloyd(trellis, torch.arange(len(sets)), generator)
    unit = LARGEST / trellis.levels.abs().max().item()
    return Trellis((unit * trellis.levels).round().sort(dim=1).values, unit)


def _sets(memory: int) -> Tensor:
    """Which of four sets each window has, by the parities of two choices of its bits."""
    windows = torch.arange(2 ** (memory + 1))
    sets = torch.zeros_like(windows)
    low, high = CHECKS[memory]
    for check, weight in ((low, 1), (high, 2)):
        for j in range(memory + 1):  # the bit that is j codes back
            if check >> j & 1:
                sets ^= weight * (windows >> (memory - j) & 1)
    return sets


def _lloyd(trellis: Trellis, owners: Tensor, generator: torch.Generator) -> Trellis:
    """A round: every level becomes the mean of what the best paths round to it and to those of the
    windows with the same owner."""
    sample = torch.randn(LONG, SAMPLES, generator=generator)
    sample /= sample.square().mean().sqrt()
    found = paths(trellis, sample, torch.zeros(trellis.states, SAMPLES))
    codes = back(trellis, found, found.cost.argmin(dim=0)).flatten()
    own = trellis.levels.shape[1]
    shared = owners[codes // own] * own + codes % own
    count = torch.bincount(shared, minlength=trellis.levels.numel())
    total = torch.zeros(trellis.levels.numel()).index_add_(0, shared, sample.flatten())
    of_each = owners[:, None] * own + torch.arange(own)
    levels = (total[of_each] + INERTIA * trellis.levels) / (count[of_each] + INERTIA)
    return Trellis(levels.sort(dim=1).values, 1.0)


def distortion(trellis: Trellis, blocks: int = 4096, steps: int = STEPS) -> float:
    """The mean squared error of numbers from N(0, 1)."""
    sample = torch.randn(blocks, steps, generator=torch.Generator().manual_seed(1))
    sample /= sample.square().mean().sqrt()
    rounded = trellis.values(search(trellis, trellis.unit * sample)) / trellis.unit
    return (sample - rounded).square().mean().item()


if __name__ == "__main__":
    stored = {}
    for bits, memory in MEMORY.items():
        trellis = train(bits, memory)
        stored |= {f"{bits}": trellis.levels.to(torch.int8),
                   f"unit.{bits}": torch.tensor(trellis.unit)}
    save_file(stored, TABLES)
    for bits, trellis in tables().items():
        print(f"{bits} bits, {trellis.states} states: {distortion(trellis):.5f}")
