"""Hidden states between two blocks, where they would take too much memory."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class OnDisk(MutableMapping[int, Tensor]):
    """fp32 tensors in files of their own: read and written, not mapped, so that no page of them
    counts as this process's memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: dict[int, torch.Size] = {}

    def __getitem__(self, number: int) -> Tensor:
        found = np.fromfile(self._folder / str(number), dtype=np.float32)
        return torch.from_numpy(found).view(self._shapes[number])

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._shapes[number] = tensor.shape
        tensor.numpy().tofile(self._folder / str(number))

    def __delitem__(self, number: int) -> None:
        del self._shapes[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
