"""Times calls on a GPU, as every kernel figure of this project is made.

A figure is the median time of a call inside a CUDA graph of at least 50 calls, over replays. The
calls go in turn through several sets of inputs and deltas, together many times the L2 cache, so
that nothing is found there that a model with other layers in between would not find. Random data.
The device's own ceilings are measured first, the same way, in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rows import CEILING, Row, append_row, check_header, command_of, commit, roof_us
from torch import Tensor

Call = Callable[[], object]

MIN_CALLS = 50  # in a graph
MIN_GRAPH_MS = 3.0  # shorter graphs get more calls: the gap between two replays is some µs
WARM_MS = 100.0  # of replays before any is timed, for the clocks; at most half the timed ones
MIN_SETS, MAX_SETS = 4, 2048
ROTATED_BYTES = 400e6  # of all sets together, and no less than
ROTATED_CACHES = 4  # times the L2 cache
MEMORY_SHARE = 0.6  # of the free memory, for the sets
PROBE_SECONDS = 0.03  # to choose between the paths of an implementation


@dataclass(frozen=True)
class Prepared:
    """An implementation's calls on data that is ready."""

    paths: dict[str, list[Call]]  # by the path's name, a call for each set
    moved: float  # bytes that a call must move, everything once
    flops: float  # of a call
    error: float | None = None


@dataclass(frozen=True)
class Work:
    """An implementation at one case: how much memory a set takes, and how to make that many."""

    set_bytes: float
    build: Callable[[int], Prepared]
    sets: int | None = None  # None: as many as the rotation needs


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    us: float
    us_min: float
    us_max: float
    calls: int
    replays: int


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: GB/s read and written, TFLOP/s on random data, µs of a launch."""

    copy_gb_per_s: float
    tflop_per_s: dict[str, float]  # by dtype of the operands
    launch_us: float


class SkippedError(Exception):
    """Why a measurement was not made."""


def require_gpu(program: str) -> None:
    if not torch.cuda.is_available():
        sys.exit(f"{program} measures kernels on an NVIDIA GPU; torch {torch.__version__} sees "
                 "none on this machine.")


# --- timing ------------------------------------------------------------------------------------


def time_graph(calls: list[Call], seconds: float) -> Timing:
    """The calls in turn, over and over, captured once and replayed for about `seconds`."""
    rounds = math.ceil(MIN_CALLS / len(calls))
    warm_up(calls)
    graph = capture(calls, rounds)
    once = replay_ms(graph, 1)[0]
    if once < MIN_GRAPH_MS:
        rounds = math.ceil(rounds * MIN_GRAPH_MS / once)
        graph = capture(calls, rounds)
    warm = min(WARM_MS, 500 * seconds)
    if once < warm:
        once = min(replay_ms(graph, min(50, math.ceil(warm / max(once, MIN_GRAPH_MS)))))
    replays = min(200, max(3 if once > 500 else 5, int(seconds * 1e3 / once)))
    count = rounds * len(calls)
    return timing([ms * 1e3 / count for ms in replay_ms(graph, replays)], count)


def time_eager(calls: list[Call], repeats: int) -> Timing:
    """Each call between two events, without a graph: for what takes long enough, or must."""
    warm_up(calls[:1])
    times = []
    for i in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[i % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return timing(times, 1)


def timing(us: list[float], calls: int) -> Timing:
    return Timing(statistics.median(us), min(us), max(us), calls, len(us))


def warm_up(calls: list[Call]) -> None:
    """On a stream of its own, as capturing needs it: compiles, makes handles and workspaces."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def capture(calls: list[Call], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def fastest_path(paths: dict[str, list[Call]], seconds: float) -> tuple[str, Timing, str]:
    """(name, timing, what went wrong with others): a short look at each, then the fastest."""
    faults: dict[str, str] = {}
    looks: dict[str, float] = {}
    for name, calls in paths.items() if len(paths) > 1 else ():
        try:
            looks[name] = time_graph(calls, PROBE_SECONDS).us
        except Exception as error:  # a path that does not run here leaves the others to be timed
            faults[name] = reason(error)
            check_device(error)
    if len(paths) > 1 and not looks:
        raise SkippedError("; ".join(dict.fromkeys(faults.values())))
    name = min(looks, key=looks.__getitem__) if looks else next(iter(paths))
    note = "; ".join(f"path {path} failed: {why}" for path, why in faults.items())
    return name, time_graph(paths[name], seconds), note


# --- memory and data ---------------------------------------------------------------------------


def rotation(set_bytes: float, free_bytes: float, cache_bytes: float) -> int:
    """How many sets: together several L2 caches and at least four, as far as memory allows."""
    wanted = math.ceil(max(ROTATED_BYTES, ROTATED_CACHES * cache_bytes) / set_bytes)
    room = int(MEMORY_SHARE * free_bytes / set_bytes)
    if room < 1:
        raise SkippedError(f"out of memory: a set takes {set_bytes / 1e9:.1f} GB, "
                           f"{free_bytes / 1e9:.1f} GB are free")
    return min(max(MIN_SETS, wanted), room, MAX_SETS)


def random_words(count: int, device: str) -> Tensor:
    """int32 words, every bit random."""
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=device)


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def check_device(error: Exception) -> None:
    """After a fault on the device itself nothing more can be measured in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        sys.exit(f"the device failed and nothing more can be measured: {reason(error)}")


# --- a run -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--seconds", type=float, default=0.5, help="of replays a figure")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="start no further measurement after these")
    parser.add_argument("--quick", action="store_true", help="a tenth of a second a figure")


class Session:
    """One run of a benchmark: its ceilings, its clock, and where its rows go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.csv: Path | None = args.csv
        self.seconds = 0.1 if args.quick else args.seconds
        self.end = time.monotonic() + 60 * args.minutes
        self.not_run = 0
        if self.csv is not None and self.csv.exists():
            try:
                check_header(self.csv)
            except ValueError as error:
                sys.exit(str(error))
        self.origin = {
            "device": torch.cuda.get_device_name(),
            "commit": commit(Path(__file__).parent),
            "command": command_of(sys.argv),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        }
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.ceilings = measure_ceilings(self)

    def measure(self, row: Row, work: Work, eager_repeats: int | None = None) -> Row | None:
        """Time one implementation; the row is printed and written, also where it was skipped."""
        if time.monotonic() > self.end:
            self.not_run += 1
            return None
        try:
            row = self._timed(row, work, eager_repeats)
        except Exception as error:  # the other implementations and cases are still of use
            skipped = isinstance(error, SkippedError)
            row = dataclasses.replace(row, note=str(error) if skipped else reason(error))
            check_device(error)
        free_memory()
        return self.write(row)

    def _timed(self, row: Row, work: Work, eager_repeats: int | None) -> Row:
        free_bytes = torch.cuda.mem_get_info()[0]
        sets = work.sets or rotation(work.set_bytes, free_bytes, self.cache_bytes)
        ready = work.build(sets)
        if eager_repeats is not None:
            path, calls = next(iter(ready.paths.items()))
            timed, note = time_eager(calls, eager_repeats), "eager, not in a graph"
        else:
            path, timed, note = fastest_path(ready.paths, self.seconds)
        rate = self.ceilings.tflop_per_s.get(row.dtype, self.ceilings.tflop_per_s["float32"])
        copy = self.ceilings.copy_gb_per_s
        return dataclasses.replace(
            row, path=path, us=timed.us, us_min=timed.us_min, us_max=timed.us_max,
            bytes=ready.moved, flops=ready.flops, gb_per_s=ready.moved / timed.us / 1e3,
            tflop_per_s=ready.flops / timed.us / 1e6,
            roof_share=roof_us(ready.moved, ready.flops, copy, rate) / timed.us,
            error=ready.error, calls=timed.calls, sets=sets, replays=timed.replays,
            copy_gb_per_s=copy, roof_tflop_per_s=rate, note=note)

    def write(self, row: Row) -> Row:
        row = dataclasses.replace(row, **self.origin)
        if self.csv is not None:
            append_row(self.csv, row)
        print(line(row), flush=True)
        return row

    def close(self) -> None:
        if self.not_run:
            print(f"{self.not_run} measurements were not begun: out of --minutes")


def line(row: Row) -> str:
    what = f"{row.op:<20} {row.shape:<22} {row.models or '':>3} x {row.tokens or '':<4} "
    what += f"{row.dtype:<8} {row.bits:<5} {row.impl:<16} "
    if row.us is None:
        return what + f"skipped: {row.note}"
    text = what + f"{row.us:9.2f} us ({row.us_min:.2f} .. {row.us_max:.2f})"
    if row.gb_per_s:
        text += f" {row.gb_per_s:6.0f} GB/s"
    if row.tflop_per_s:
        text += f" {row.tflop_per_s:6.1f} TFLOP/s"
    if row.roof_share is not None:
        text += f" {row.roof_share:4.0%} of roof"
    if row.error is not None:
        text += f"  error {row.error:.1e}"
    return text + "".join(f"  [{part}]" for part in (row.path, row.note) if part)


# --- the device's ceilings ---------------------------------------------------------------------


def measure_ceilings(session: Session) -> Ceilings:
    """Copy, matrix products and an empty kernel, each written as a row of its own."""
    torch.backends.cuda.matmul.allow_tf32 = False
    copy = _copy(session)
    rates = {"bfloat16": _matmul(session, 8192, torch.bfloat16),
             "float16": _matmul(session, 8192, torch.float16),
             "float32": _matmul(session, 4096, torch.float32)}
    timed = time_graph([lambda: torch.cuda._sleep(0)] * 500, min(session.seconds, 0.2))
    _write_ceiling(session, "empty kernel", "", "", timed)
    free_memory()
    return Ceilings(copy, rates, timed.us)


def _copy(session: Session) -> float:
    """The quicker of CUDA's copy (in a graph it may be a copy engine's) and of a kernel that reads
    and writes as much."""
    words = 2**29  # 2 GiB
    pairs = [(torch.empty_like(a), a) for a in (random_words(words, "cuda") for _ in range(2))]
    moved = 2 * words * 4
    ways: dict[str, Callable[[Tensor, Tensor], object]] = {
        "copy": lambda target, source: target.copy_(source),
        "copy by a kernel": lambda target, source: torch.neg(source, out=target)}
    rates = []
    for name, way in ways.items():
        timed = time_graph([lambda way=way, pair=pair: way(*pair) for pair in pairs],
                           session.seconds)
        _write_ceiling(session, name, "2 GiB", "int32", timed, moved=moved)
        rates.append(moved / timed.us / 1e3)
    return max(rates)


def _matmul(session: Session, n: int, dtype: torch.dtype) -> float:
    def operand() -> Tensor:
        return torch.randn(n, n, device="cuda").to(dtype)

    product = torch.empty(n, n, dtype=dtype, device="cuda")
    pairs = [(operand(), operand()) for _ in range(2)]
    timed = time_graph([lambda a=a, b=b: torch.mm(a, b.mT, out=product) for a, b in pairs],
                       session.seconds)
    name = str(dtype).removeprefix("torch.")
    _write_ceiling(session, f"matmul {name}", f"{n}x{n}x{n}", name, timed, flops=2 * n**3)
    return 2 * n**3 / timed.us / 1e6


def _write_ceiling(session: Session, name: str, shape: str, dtype: str, timed: Timing,
                   moved: float = 0, flops: float = 0) -> None:
    session.write(Row(op=CEILING, shape=shape, models=None, tokens=None, dtype=dtype, bits="",
                      impl=name, us=timed.us, us_min=timed.us_min, us_max=timed.us_max,
                      bytes=moved, flops=flops, gb_per_s=moved / timed.us / 1e3,
                      tflop_per_s=flops / timed.us / 1e6, calls=timed.calls,
                      replays=timed.replays))
