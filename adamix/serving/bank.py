"""Which fine-tunes are on the device, and which of them each row of a batch gets."""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch

from adamix.artifacts import ModelDelta
from adamix.errors import AdamixError, BankError, BankFullError
from adamix.serving.arena import aligned
from adamix.serving.image import DeltaImage, Places, make_image
from adamix.serving.memory import Memory, Resident
from adamix.serving.routing import BASE, Routing


@dataclass(frozen=True)
class BankMetrics:
    """Since the bank was made."""

    hits: int = 0  # fine-tunes that a route or a request named and that were on the device
    misses: int = 0  # and that were not
    evictions: int = 0  # from the device, to make room
    copies: int = 0  # to the device
    copied_bytes: int = 0
    reads: int = 0  # from disk
    read_seconds: float = 0.0  # reading, checking and laying out


@dataclass
class _Known:
    """A fine-tune by name: where it was read from, and what of it is on the host."""

    path: Path | None
    image: DeltaImage | None
    delta: Callable[[], ModelDelta | None]  # the one in memory that it was made of, while that is
    pinned: bool = False
    holders: int = 0  # requests that run on it


# Names of rows; or of requests whose tokens are one row, and how many tokens each has.
Rows = tuple[tuple[str | None, ...], tuple[int, ...] | None]


class Route:
    """What :meth:`DeltaBank.route` returns: in force at once; in a `with`, until its end."""

    def __init__(self, bank: DeltaBank, before: Rows) -> None:
        self._bank, self._before = bank, before

    def __enter__(self) -> Route:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        names, counts = self._before
        with self._bank.lock:
            known = [name if name in self._bank else None for name in names]
            self._bank._apply(known, counts)


class DeltaBank:
    """Many fine-tunes of one base, each row of a batch routed to its own.

    Made by :func:`adamix.attach`. Fine-tunes are loaded under names; as many as fit are on the
    device, the least recently routed ones make room, and those stay on the host, ready to come
    back. Nothing on the device moves or grows, so CUDA graphs that were captured before stay
    valid. Threads may share it: `lock` is held while it changes, and by who runs a batch that must
    not be rerouted meanwhile. Call it on the stream that the model runs on.
    """

    def __init__(self, places: Places, routing: Routing, memory: Memory, *, slots: int,
                 host_bytes: int | None, read: Callable[[Path], ModelDelta],
                 check: Callable[[ModelDelta, str], None], detach: Callable[[], None]) -> None:
        self.slots = slots
        self.routing = routing
        self.lock = threading.RLock()
        self._places, self._memory = places, memory
        self._read, self._check, self._detach = read, check, detach
        self._host_bytes = host_bytes
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # least recently routed first
        self._route: Rows = ((None,), None)
        self._metrics = BankMetrics()

    # --- what is there

    @property
    def names(self) -> list[str]:
        """The fine-tunes that can be routed to."""
        return sorted(list(self._known))

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @property
    def resident(self) -> list[str]:
        """Those on the device, the least recently routed first."""
        return list(self._resident)

    @property
    def metrics(self) -> BankMetrics:
        """Counts since the bank was made."""
        return self._metrics

    @property
    def nbytes(self) -> int:
        """Bytes on the device, fixed from the start."""
        return self._memory.nbytes

    @property
    def free_bytes(self) -> int:
        """Of the arena; a delta needs one stretch of it."""
        return 4 * self._memory.arena.free_words

    # --- loading

    def load(self, name: str, delta: str | Path | ModelDelta, *, pin: bool = False,
             source: Path | None = None) -> None:
        """Read a fine-tune and begin to copy it to the device; one of the same name is replaced.

        The copy goes on beside the model's work; the first route to the fine-tune waits for it.

        Args:
            name: what `route` calls it.
            delta: a delta folder, or one in memory; the same one under several names is on the
                host once.
            pin: keep it on the device until `unpin`.
            source: the folder of a delta in memory, to be read again when the host has no room.

        Raises:
            DeltaFileError, FingerprintError: the folder is damaged, or of another base.
            BankError: the model has no place for what it changes, or the device none for it;
                requests run on the one of the same name.
        """
        in_memory = delta if isinstance(delta, ModelDelta) else None
        path = source if isinstance(delta, ModelDelta) else Path(delta)
        image = self._same_image(in_memory) or self._image(name, path, in_memory)
        self._check_size(name, image)
        with self.lock:
            self._check_idle(name)
            was_routed = name in self._route[0]
            if name in self._resident:
                self._evict(name)
            made_of = weakref.ref(in_memory) if in_memory is not None else lambda: None
            self._known[name] = _Known(path, image, made_of, pin)
            self._bring(name, keep={name, *self._route[0]})
            if was_routed:
                self._apply(*self._route)
            self._trim_host()

    def unload(self, name: str) -> None:
        """Forget a fine-tune.

        Raises:
            BankError: there is none of this name, rows are routed to it, or requests run on it.
        """
        with self.lock:
            self._find(name)
            self._check_idle(name)
            if name in self._route[0]:
                raise BankError(f"rows are routed to {name}: route them elsewhere before "
                                f"unloading it")
            if name in self._resident:
                self._evict(name)
            del self._known[name]

    def prefetch(self, name: str) -> None:
        """Begin to bring a fine-tune to the device, so that a route to it need not wait."""
        with self.lock:
            self._find(name)
            self._bring(name, keep={name, *self._route[0]})

    def pin(self, name: str) -> None:
        """Keep a fine-tune on the device, and begin to bring it there."""
        with self.lock:
            self._find(name).pinned = True
            self.prefetch(name)

    def unpin(self, name: str) -> None:
        """Let a fine-tune make room for others again."""
        self._find(name).pinned = False

    def hold(self, name: str, requests: int = 1) -> None:
        """Keep a fine-tune on the device for requests that run, until as many are released.

        Raises:
            BankFullError: it does not fit beside what is pinned, held or routed.
            BankError: there is none of this name.
        """
        with self.lock:
            known = self._find(name)
            here = name in self._resident
            self._bring(name, keep={name, *self._route[0]})
            self._count(hits=int(here), misses=int(not here))
            known.holders += requests

    def release(self, name: str, requests: int = 1) -> None:
        """Say that requests which held a fine-tune are over."""
        with self.lock:
            self._find(name).holders -= requests

    def detach(self) -> None:
        """Make the model the base alone again, as it was before `attach`.

        Raises:
            BankError: requests run on a fine-tune.
        """
        with self.lock:
            for name in self._known:
                self._check_idle(name)
            self._detach()

    def _check_idle(self, name: str) -> None:
        known = self._known.get(name)
        if known is not None and known.holders:
            raise BankError(f"{known.holders} requests run on {name}: wait for them, or cancel "
                            f"them")

    # --- routing

    def route(self, names: Sequence[str | None]) -> Route:
        """Route row i of the batches that follow to the fine-tune `names[i]`; None is the base.

        In place, for graphs that are captured already (with as many rows); as a context manager,
        the route before comes back at its end. A batch of k times as many rows (beams, several
        sequences a prompt) has each row k times in turn. What is not on the device comes there
        first, in place of what was not routed to for longest.

        Raises:
            BankError: an unknown name, no name at all, or more fine-tunes than fit.
        """
        with self.lock:
            before = self._route
            self._apply(names, None)
        return Route(self, before)

    def route_tokens(self, names: Sequence[str | None], counts: Sequence[int]) -> Route:
        """Route one row of many requests' tokens: the next `counts[i]` of them to `names[i]`.

        What follows them, as padding, is the base's.
        """
        if len(names) != len(counts):
            raise BankError(f"a count for each name: got {len(names)} names, {len(counts)} counts")
        with self.lock:
            before = self._route
            self._apply(names, counts)
        return Route(self, before)

    def end_batch(self) -> None:
        """Say that no batch runs until the next route: what the last one named may make room.

        The device's buffer stays as it is: for callers that route before each batch.
        """
        with self.lock:
            self._route = ((None,), None)

    def _apply(self, names: Sequence[str | None], counts: Sequence[int] | None) -> None:
        """Switch the route; where that fails, back to the one before: its slots may be others'."""
        for name in names:
            if name is not None:
                self._find(name)
        try:
            self._switch((tuple(names), None if counts is None else tuple(counts)))
        except AdamixError:
            try:
                self._switch(self._route)
            except AdamixError:
                self._switch(((None,), None))
            raise

    def _switch(self, rows: Rows) -> None:
        names, counts = rows
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        for name in wanted:
            here = name in self._resident
            if not self._known[name].holders:  # the others were counted when their requests came
                self._count(hits=int(here), misses=int(not here))
            self._bring(name, keep=set(wanted))
            self._memory.show(self._resident[name])
            self._resident.move_to_end(name)
        slots = {name: self._resident[name].slot for name in wanted}
        of_rows = torch.tensor([BASE if name is None else slots[name] for name in names],
                               dtype=torch.int32)
        if counts is not None:
            of_rows = of_rows.repeat_interleave(torch.tensor(counts))
        self.routing.write(of_rows, by_token=counts is not None)
        self._route = rows

    # --- residency

    def _find(self, name: str) -> _Known:
        if name not in self._known:
            loaded = ", ".join(self.names) or "none"
            raise BankError(f"no fine-tune {name!r} is loaded; loaded are: {loaded}")
        return self._known[name]

    def _bring(self, name: str, keep: set[str | None]) -> None:
        """Make a fine-tune resident; `keep` must not make room for it."""
        if name in self._resident:
            return
        known = self._known[name]
        if known.image is None:
            known.image = self._image(name, known.path, None)
        self._known.move_to_end(name)
        begin, slot = self._place(name, known.image.words.numel(), keep)
        copied = self._memory.copy(known.image, begin)
        words = known.image.words.numel()
        self._resident[name] = Resident(slot, begin, words, known.image, copied)
        self._count(copies=1, copied_bytes=known.image.words.nbytes)
        self._trim_host()

    def _place(self, name: str, words: int, keep: set[str | None]) -> tuple[int, int]:
        """An extent and a slot, others making room."""
        while True:
            taken = {resident.slot for resident in self._resident.values()}
            if len(taken) < self.slots:
                begin = self._memory.arena.allocate(words)
                if begin is not None:
                    return begin, min(set(range(self.slots)) - taken)
            others = [other for other in self._resident if other not in keep
                      and not self._known[other].pinned and not self._known[other].holders]
            if not others:
                held = ", ".join(self._resident) or "nothing"
                raise BankFullError(
                    f"{name} ({4 * words:,} bytes) does not fit beside what is pinned or in use "
                    f"({held}): the bank has {self.slots} slots and "
                    f"{4 * self._memory.arena.size:,} bytes")
            self._evict(others[0])
            self._count(evictions=1)

    def _evict(self, name: str) -> None:
        self._memory.clear(self._resident.pop(name))

    # --- the host's side

    def _same_image(self, delta: ModelDelta | None) -> DeltaImage | None:
        for known in list(self._known.values()):
            if delta is not None and known.delta() is delta:
                return known.image
        return None

    def _image(self, name: str, path: Path | None, delta: ModelDelta | None) -> DeltaImage:
        """From the delta where there is one in memory, else from its folder."""
        start = time.perf_counter()
        if delta is None:
            assert path is not None
            delta = self._read(path)
            self._count(reads=1)
        self._check(delta, name)
        image = make_image(name, delta, self._places, pin=self._memory.tables.is_cuda)
        self._count(read_seconds=time.perf_counter() - start)
        return image

    def _check_size(self, name: str, image: DeltaImage) -> None:
        if aligned(image.words.numel()) > self._memory.arena.size:
            raise BankError(f"{name} has {image.words.nbytes:,} bytes, the bank "
                            f"{4 * self._memory.arena.size:,}: attach with more capacity_bytes")

    def _trim_host(self) -> None:
        """Keep what the host holds within its limit; what has no folder to be read again stays."""
        if self._host_bytes is None:
            return
        for known in self._known.values():
            images = {id(one.image): one.image for one in self._known.values()}
            held = sum(image.nbytes for image in images.values() if image is not None)
            if held <= self._host_bytes:
                return
            if known.path is not None:
                known.image = None

    def _count(self, **more: float) -> None:
        now = self._metrics
        self._metrics = replace(now, **{key: getattr(now, key) + n for key, n in more.items()})
