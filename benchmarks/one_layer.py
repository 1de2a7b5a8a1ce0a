"""One decoder layer of a made pair, compressed from its Gram matrices on, by adamix and plainly."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import straightforward
import torch
from bench_quality import GRAM_OF
from made_models import layer_matrices, random_gram
from straightforward import WIDTHS, Clock
from torch import Tensor

from adamix import Config, relative_error
from adamix.compression.allocate import allocate
from adamix.compression.hessian import hessian
from adamix.compression.matrix import MatrixResult, quantize_matrix
from adamix.devices import JOBS
from adamix.parallel import workers
from adamix.solving import solvers
from adamix.source.checkpoints import Checkpoint
from adamix.storage.pack import pack

RUNS = 3  # of adamix, whose median counts; the other is run once
WARM_SIDE = 256  # of the matrix that loads the libraries before anything is timed


@dataclass(frozen=True)
class Layer:
    """ΔW of each matrix by the input that it reads, and X Xᵀ of that input."""

    groups: dict[str, dict[str, Tensor]]
    grams: dict[str, Tensor]


@dataclass(frozen=True)
class LayerResult:
    """What it took; `measured` where only a share was done, and `seconds` is that, scaled up."""

    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    measured: float | None = None
    measured_stages: dict[str, float] = field(default_factory=dict)
    error: float | None = None  # relative, mean of the matrices; None where a share was done
    note: str = ""
    device_bytes: int | None = None


def read_layer(base: Path, finetuned: Path, device: str) -> Layer:
    """The first layer of a pair, with random Gram matrices."""
    sources = Checkpoint(base), Checkpoint(finetuned)
    groups: dict[str, dict[str, Tensor]] = {}
    for name in layer_matrices(sources[0].names):
        old, new = (source.read(name).to(device).float() for source in sources)
        kind = name.split(".")[-2]
        groups.setdefault(GRAM_OF.get(kind, kind), {})[name] = new - old
    widths = {key: next(iter(deltas.values())).shape[1] for key, deltas in groups.items()}
    return Layer(groups, {key: random_gram(n, device, seed) for seed, (key, n) in
                          enumerate(widths.items())})


def adamix_layer(layer: Layer, config: Config, threads: int) -> LayerResult:
    """As the pipeline does it: inputs side by side, a Hessian an input; on a GPU in JOBS threads,
    with the integer programs in processes of their own."""
    device, times = _device(layer), []
    with _side_by_side(device, threads) as (executor, count, solve):
        def one(gram: Tensor, deltas: Mapping[str, Tensor]) -> dict[str, MatrixResult]:
            H = hessian(gram, config.damping)
            return {name: quantize_matrix(delta, H, config, solve=solve)
                    for name, delta in deltas.items()}

        warm = _warm(device)
        one(*warm)  # alone: torch loads its linear algebra, which two threads cannot do at once
        for job in [executor.submit(one, *warm) for _ in range(count)]:
            job.result()
        _reset_peak(device)
        for _ in range(RUNS):
            clock = Clock(device)
            with clock("all"):
                jobs = [executor.submit(one, layer.grams[key], deltas)
                        for key, deltas in layer.groups.items()]
                found = {name: result for job in jobs for name, result in job.result().items()}
            times.append(clock.seconds["all"])
    peak = _peak(device)
    error = _mean_error(layer, lambda name: pack(found[name].delta).dequantize().to(device))
    return LayerResult(statistics.median(times), error=error, device_bytes=peak)


@contextmanager
def _side_by_side(device: torch.device, threads: int
                  ) -> Iterator[tuple[Executor, int, Callable[..., Tensor]]]:
    """What compresses matrices, how many at a time, and what solves their integer programs."""
    if device.type == "cuda":
        with ThreadPoolExecutor(JOBS) as executor, solvers(JOBS) as pool:
            yield executor, JOBS, pool.allocate
    else:
        with workers(threads) as executor:
            yield executor, threads, allocate


def straightforward_layer(layer: Layer, config: Config, seconds: float | None) -> LayerResult:
    """Matrix after matrix; `seconds` as in bench_compress.py's --rival-seconds."""
    device = _device(layer)
    straightforward.compress_group(*_warm(device), config, Clock(device))
    columns = sum(delta.shape[1] for deltas in layer.groups.values() for delta in deltas.values())
    clock, found = Clock(device), {}
    _reset_peak(device)
    for key, deltas in layer.groups.items():
        share = None if seconds is None else seconds * layer.grams[key].shape[0] / columns
        found |= straightforward.compress_group(layer.grams[key], deltas, config, clock, share)
    peak = _peak(device)
    whole, stages = sum(clock.seconds.values()), dict(clock.seconds)
    if clock.widths < clock.widths_of:
        note = f"'{WIDTHS}' scaled up: {clock.widths} of {clock.widths_of} runs were made"
        return LayerResult(whole, stages, sum(clock.measured.values()), dict(clock.measured),
                           note=note, device_bytes=peak)
    error = _mean_error(layer, lambda name: found[name].U @ found[name].V)
    return LayerResult(whole, stages, error=error, device_bytes=peak)


def _device(layer: Layer) -> torch.device:
    return next(iter(layer.grams.values())).device


def _warm(device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    delta = torch.randn(WARM_SIDE, WARM_SIDE, device=device, generator=generator)
    return random_gram(WARM_SIDE, str(device)), {"warm": delta}


def _mean_error(layer: Layer, restored: Callable[[str], Tensor]) -> float:
    errors = [relative_error(delta, restored(name), layer.grams[key])
              for key, deltas in layer.groups.items() for name, delta in deltas.items()]
    return sum(errors) / len(errors)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
