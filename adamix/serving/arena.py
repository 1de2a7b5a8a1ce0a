"""Device memory for deltas of any size: one fixed tensor, extents given out and taken back.

A captured CUDA graph holds the tensor's address, so it is allocated once and never grows.
"""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

ALIGNMENT = 64  # words: 256 bytes, a whole number of memory lines


def aligned(words: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-words // ALIGNMENT) * ALIGNMENT


class Arena:
    """Words int32 `[size]` on a device, and which of them are free.

    Extents are placed where the smallest free stretch holds them (best fit): deltas of one model
    are of about one size, so what one leaves the next one fills.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.words: Tensor = torch.zeros(aligned(size), dtype=torch.int32, device=device)
        self._free: list[tuple[int, int]] = [(0, self.words.numel())]  # (begin, length), in order

    @property
    def size(self) -> int:
        """Words in all."""
        return self.words.numel()

    @property
    def free_words(self) -> int:
        """Words in no extent, perhaps in several stretches."""
        return sum(length for _, length in self._free)

    def allocate(self, words: int) -> int | None:
        """Where an extent of so many words begins; None where no free stretch is long enough."""
        words = aligned(words)
        fitting = [(length, begin) for begin, length in self._free if length >= words]
        if not fitting:
            return None
        length, begin = min(fitting)
        at = self._free.index((begin, length))
        self._free[at : at + 1] = [(begin + words, length - words)] if length > words else []
        return begin

    def release(self, begin: int, words: int) -> None:
        """Give back an extent; stretches that touch become one."""
        end = begin + aligned(words)
        at = bisect.bisect(self._free, (begin, 0))
        if at < len(self._free) and self._free[at][0] == end:
            end += self._free.pop(at)[1]
        if at > 0 and sum(self._free[at - 1]) == begin:
            begin = self._free.pop(at - 1)[0]
            at -= 1
        self._free.insert(at, (begin, end - begin))
