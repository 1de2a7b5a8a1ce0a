"""One rank of several: process groups, messages and errors by torch.distributed. The reasons for
what is done by whom, and in which order, are `ranks.py`'s."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from adamix import errors
from adamix.calibration.sums import Share
from adamix.devices import Compute, expand_segments
from adamix.environment import local_count, local_rank
from adamix.errors import AdamixError, DeviceError, RankError, reason
from adamix.ranks import Part, Ranks, Value

PATIENCE = timedelta(days=7)  # for another rank that is at work; one that died is noticed at once
LINGER = 600.0  # seconds in which rank 0 has told of an error, at most
GRACE = 1.0  # seconds from then on until it has also printed it
STUCK = 10.0  # seconds of a move after another rank's error
ASK = 0.2  # seconds between two questions to the store
ERROR, REPORTED = "error", "reported"
HEADER, BODY = 1, 2  # tags of a result's messages


class Launched(Ranks):
    """One of several, by torch.distributed."""

    def __init__(self) -> None:
        if not dist.is_initialized():  # once a process: its keys in the store stay there
            dist.init_process_group("gloo", timeout=PATIENCE)
            atexit.register(_leave)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._objects = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._results = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._moves, self._where = self._objects, torch.device("cpu")
        self._store = dist.PrefixStore(f"adamix/{self._objects.group_name}",
                                       distributed_c10d._get_default_store())
        self._ended: BaseException | None = None  # what this rank ends with
        self._faults: list[BaseException] = []  # of the thread of results
        self._asked = time.monotonic()
        self._moving: float | None = None  # since when
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def device(self, asked: str | torch.device | None) -> str | torch.device | None:
        text = str(asked or "cuda")
        if not text.startswith("cuda") or not torch.cuda.is_available():
            return asked
        if ":" in text and local_count() > 1:
            raise DeviceError(f"each of several processes takes a GPU of its own: give --device "
                              f"cuda or none, not {text}")
        if local_rank() >= torch.cuda.device_count():
            raise DeviceError(f"{local_count()} processes were started on a machine with "
                              f"{torch.cuda.device_count()} GPUs: one each is needed, or --device "
                              f"cpu")
        expand_segments()
        torch.cuda.set_device(torch.device(text) if ":" in text else local_rank())
        return asked

    def use(self, compute: Compute) -> None:
        labels = sorted(set(self.gather(compute.label)))
        if len(labels) > 1:
            raise DeviceError(f"the processes must have one kind of device, got "
                              f"{' and '.join(labels)}")
        self._where = compute.device
        if compute.is_cuda:
            self._moves = dist.new_group(backend="nccl")
            # The first operation must be one of all ranks; later ones may be of two.
            dist.all_reduce(torch.zeros(1, device=self._where), group=self._moves)

    def close(self) -> None:
        """End the groups, once all ranks are done."""
        self._over.set()
        self._watcher.join()  # no thread may be the last to hold a group when the process ends
        for group in {id(group): group for group in (
                self._moves, self._results, self._objects)}.values():
            dist.destroy_process_group(group)

    # --- objects and matrices ---------------------------------------------------------------------

    def gather(self, value: Value) -> list[Value]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(data)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        return [pickle.loads(part[:size].numpy().tobytes())
                for part, size in zip(self._all_gather(padded), sizes, strict=True)]

    def _all_gather(self, part: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.count)]
        with self._peers():
            work = dist.all_gather(parts, part, group=self._objects, async_op=True)
            pause = 1e-4
            while not work.is_completed():
                self.check()
                time.sleep(pause)
                pause = min(2 * pause, 0.01)
            work.wait()
        return parts

    def settle(self) -> None:
        if self._where.type == "cuda":
            torch.cuda.current_stream(self._where).synchronize()
            self._moving = None

    def move(self, matrix: Tensor | None, width: int, source: int, target: int) -> Tensor | None:
        if source == target or self.rank not in (source, target):
            return matrix if self.rank == target else None
        sends = self.rank == source
        if not sends:
            matrix = torch.empty((width, width), device=self._where)
        operation = dist.isend if sends else dist.irecv
        self._moving = time.monotonic()
        with self._peers():
            for work in dist.batch_isend_irecv([dist.P2POp(
                    operation, matrix, target if sends else source, self._moves)]):
                work.wait()
        if self._where.type == "cpu":  # on a GPU it has only been queued
            self._moving = None
        return None if sends else matrix

    def share(self, owners: Mapping[str, int]) -> Share:
        return Part(self, owners)

    # --- results ----------------------------------------------------------------------------------

    @contextmanager
    def results(self, take: Callable[[Value], None]) -> Iterator[Callable[[Value], None]]:
        told: queue.SimpleQueue[tuple[Value] | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._run, daemon=True, args=(
            (self._receive, take) if self.is_main else (self._send, told)))
        thread.start()
        yield (lambda value: None) if self.is_main else lambda value: told.put((value,))
        told.put(None)
        while thread.is_alive():
            thread.join(ASK / 10)
            self.check()
        self.check(now=True)

    def _run(self, function: Callable[[object], None], argument: object) -> None:
        try:
            with self._peers():
                function(argument)
        except BaseException as error:  # the main thread raises it
            self._faults.append(error)

    def _send(self, told: queue.SimpleQueue[tuple[Value] | None]) -> None:
        while True:
            value = told.get()
            data = bytearray() if value is None else bytearray(pickle.dumps(value[0]))
            dist.send(torch.tensor([len(data)]), 0, group=self._results, tag=HEADER)
            if value is None:
                return
            dist.send(torch.frombuffer(data, dtype=torch.uint8), 0, group=self._results,
                            tag=BODY)

    def _receive(self, take: Callable[[Value], None]) -> None:
        ends, header = 0, torch.zeros(1, dtype=torch.int64)
        while ends < self.count - 1:
            source = dist.recv(header, None, group=self._results, tag=HEADER)
            if not int(header):
                ends += 1
                continue
            body = torch.empty(int(header), dtype=torch.uint8)
            dist.recv(body, source, group=self._results, tag=BODY)
            take(pickle.loads(body.numpy().tobytes()))

    # --- errors -----------------------------------------------------------------------------------

    @contextmanager
    def as_one(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self._ended is None:
                self._ended = self._first(error)
            if error is self._ended or error.__cause__ is self._ended:
                raise
            raise self._ended from None

    def check(self, *, now: bool = False) -> None:
        if self._faults:
            raise self._faults[0]
        if now or time.monotonic() - self._asked > ASK:
            self._asked = time.monotonic()
            if found := self._told():
                self._ended = _rebuilt(found)
                raise self._ended

    def part(self) -> None:
        """After an error: rank 0 says that it has told of it, all others wait for that."""
        self._over.set()
        self._watcher.join()
        try:
            if self.is_main:
                self._store.set(REPORTED, "")
                return
            end = time.monotonic() + LINGER
            while not self._store.check([REPORTED]) and time.monotonic() < end:
                time.sleep(ASK)
            time.sleep(GRACE)
        except RuntimeError:  # the store is gone, and torchrun with it
            pass

    def _first(self, error: BaseException) -> BaseException:
        """The error of all ranks that came first; tells of this one where none did."""
        told = json.dumps({"rank": self.rank, "kind": type(error).__name__, "text": str(error)})
        try:
            found = json.loads(self._store.compare_set(ERROR, "", told))
        except RuntimeError:
            return error
        return error if found["rank"] == self.rank else _rebuilt(found)

    def _told(self) -> dict[str, object] | None:
        """The error that a rank has told of."""
        try:
            return json.loads(self._store.get(ERROR)) if self._store.check([ERROR]) else None
        except RuntimeError as error:
            raise RankError("torchrun's store is gone, and other processes with it") from error

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """A rank that is gone is an error of ours: the one that it told of, if it did."""
        try:
            yield
        except RuntimeError as error:
            if self._ended is not None or isinstance(error, AdamixError):
                raise
            for _ in range(10):
                time.sleep(ASK)
                self.check(now=True)
            raise RankError(f"another process of this compression has ended: {reason(error)}"
                            ) from error

    def _watch(self) -> None:
        """End a process that cannot notice another's error."""
        while not self._over.wait(1.0):
            since = self._moving
            if since is None or time.monotonic() - since < STUCK:
                continue
            try:
                found = self._told()
                error = None if found is None else _rebuilt(found)
            except RankError as gone:
                error = gone
            if error is not None and self._moving == since:
                if self.is_main:
                    print(f"adamix: error: {error}", file=sys.stderr, flush=True)
                os._exit(1)


def _leave() -> None:
    """End what is left of torch.distributed while its threads can still be joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _rebuilt(found: Mapping[str, object]) -> BaseException:
    """Another rank's error."""
    if found["kind"] == KeyboardInterrupt.__name__:
        return KeyboardInterrupt()
    kind, text = getattr(errors, str(found["kind"]), None), str(found["text"])
    if isinstance(kind, type) and issubclass(kind, AdamixError):
        return kind(text)
    return RankError(f"process {found['rank']} failed: {found['kind']}: {text}")
