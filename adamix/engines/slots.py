"""Slots of equal size for an engine that says itself which fine-tune is in which slot.

An engine's own scheduler decides what is resident (`adamix.serving.bank` does where there is
none), so nothing here evicts: a slot is filled over what it held. Every slot has its own extent
of the arena; whatever passed `image` fits any of them, and filling cannot fail.
"""

from __future__ import annotations

import torch

from adamix.artifacts import ModelDelta
from adamix.errors import BankError
from adamix.serving.arena import ALIGNMENT
from adamix.serving.image import DeltaImage, Places, make_image
from adamix.serving.memory import Memory, Resident


class SlotBank:
    """The arena and tables of all layers of one worker; allocated here, never moved.

    Args:
        places: the matrices that deltas may change.
        slots: fine-tunes at a time.
        capacity_bytes: of all slots together.
        device: of the layers.
    """

    def __init__(self, places: Places, slots: int, capacity_bytes: int,
                 device: torch.device) -> None:
        self.places, self.slots = places, slots
        self._slot_words = capacity_bytes // (4 * slots * ALIGNMENT) * ALIGNMENT
        self._memory = Memory(places, slots, 4 * slots * self._slot_words, device)
        self.arena = self._memory.arena.words  # int32 [words]

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        return self._memory.nbytes

    def table(self, matrix: str) -> torch.Tensor:
        """The table of one matrix, int64 `[slots, TABLE_COLUMNS]`, as `delta_gemm` reads it."""
        return self._memory.tables[self.places.matrices[matrix].index]

    def image(self, name: str, delta: ModelDelta) -> DeltaImage:
        """Lay a fine-tune out on the host, so that it fits any slot.

        Raises:
            BankError: it changes what has no place, or has more components or bytes than fit.
        """
        image = make_image(name, delta, self.places, pin=self.arena.is_cuda)
        if image.words.numel() > self._slot_words:
            needed = self.slots * image.words.nbytes
            raise BankError(f"{name} takes {image.words.nbytes:,} bytes, a slot has "
                            f"{4 * self._slot_words:,}: give capacity_bytes of at least {needed}")
        return image

    def fill(self, slot: int, image: DeltaImage | None) -> None:
        """From here on the current stream sees this fine-tune in the slot; None empties it."""
        self._memory.tables[:, slot].zero_()
        if image is None:
            return
        begin, words = slot * self._slot_words, image.words.numel()
        copied = self._memory.copy(image, begin)
        self._memory.show(Resident(slot, begin, words, image, copied))
