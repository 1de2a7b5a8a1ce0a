"""The bank's tensors on the device: allocated once, never moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adamix.ops import TABLE_COLUMNS, TABLE_SCALE_OFFSET, TABLE_U_OFFSET, TABLE_V_OFFSET
from adamix.serving.arena import Arena
from adamix.serving.image import DeltaImage, Places, ValuesPlace, base_values
from adamix.serving.routing import BASE

OFFSETS = [TABLE_V_OFFSET, TABLE_U_OFFSET, TABLE_SCALE_OFFSET]


@dataclass
class Resident:
    """A fine-tune on the device, or on its way."""

    slot: int
    begin: int  # of its extent in the arena
    words: int
    image: DeltaImage | None  # until the tables show it
    copied: torch.cuda.Event | None  # None on the CPU


class Memory:
    """Arena, tables and values, and how a delta comes into them and leaves.

    Stream order is what keeps running kernels and changes apart: a slot's table row is zero from
    before its words change until after they have, on the current stream; words travel on a stream
    of their own, which the current one waits for only when a route asks for the fine-tune.
    """

    def __init__(self, places: Places, slots: int, capacity_bytes: int,
                 device: torch.device) -> None:
        self.arena = Arena(capacity_bytes // 4, device)
        self.tables: Tensor = torch.zeros(len(places.matrices), slots, TABLE_COLUMNS,
                                          dtype=torch.int64, device=device)
        self.values = {dtype: values.to(device).repeat(slots + 1, 1)
                       for dtype, values in base_values(places).items()}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def columns(self, first: ValuesPlace, last: ValuesPlace | None = None) -> Tensor:
        """A parameter's values, or those of several that lie side by side: `[slots + 1, n]`, the
        base's last."""
        return self.values[first.dtype][:, first.begin : (last or first).end]

    def replacing(self, places: Places) -> dict[torch.dtype, Tensor]:
        """The leading columns, which stand in the place of the base's values: those of norms, not
        what is added to an output."""
        return {dtype: values[:, : max((place.end for place in places.values.values()
                                        if place.dtype == dtype and not place.is_added), default=0)]
                for dtype, values in self.values.items()}

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        tensors = (self.arena.words, self.tables, *self.values.values())
        return sum(tensor.nbytes for tensor in tensors)

    def copy(self, image: DeltaImage, begin: int) -> torch.cuda.Event | None:
        """Send a delta's words to their extent; the event says when they are there."""
        target = self.arena.words[begin : begin + image.words.numel()]
        if self._copies is None:
            target.copy_(image.words)
            return None
        self._copies.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self._copies):
            target.copy_(image.words, non_blocking=True)
            return self._copies.record_event()

    def show(self, resident: Resident) -> None:
        """From here on the current stream sees the delta in its slot."""
        image = resident.image
        if image is None:
            return
        if resident.copied is not None:
            torch.cuda.current_stream(self.tables.device).wait_event(resident.copied)
        table = image.table.clone()
        table[:, OFFSETS] += resident.begin
        if self.tables.is_cuda:
            table = table.pin_memory()
        self.tables[:, resident.slot].copy_(table, non_blocking=True)
        for dtype, values in image.values.items():
            self.values[dtype][resident.slot].copy_(values, non_blocking=True)
        resident.image = None

    def clear(self, resident: Resident) -> None:
        """From here on the current stream sees an empty slot."""
        self.tables[:, resident.slot].zero_()
        for values in self.values.values():
            values[resident.slot] = values[BASE]
        self.arena.release(resident.begin, resident.words)
