"""Bounds on the memory of a compression that is not done yet, the process's and a GPU's."""

from __future__ import annotations

import math
from collections import Counter

from adamix.calibration.filling import own_tensors
from adamix.calibration.sampling import chunk_bytes
from adamix.compression.share import SPREAD
from adamix.costs import sampling_chunks
from adamix.devices import matrix_device_bytes, plan_device
from adamix.estimation_gpu import (
    Job,
    calibrating_bytes,
    host_bytes,
    reading_bytes,
    sampling_device_bytes,
    with_workspaces,
)
from adamix.foreseen import Foreseen
from adamix.memory import (
    check_survey,
    matrix_bytes,
    plan_memory,
    resident_bytes,
    sampling_bytes,
    sampling_threads,
    survey_bytes,
    unbounded_bytes,
)
from adamix.naming import index_of
from adamix.source.parts import ModelTensors
from adamix.source.targets import Target, Treatment


def host_memory(run: Foreseen) -> dict[str, int]:
    """Bytes of the process by stage. Raises MemoryLimitError, CalibrationError."""
    held, shapes = resident_bytes(), run.shapes.values()
    if run.limit is not None:
        check_survey(run.limit, shapes)
    reading = reading_bytes(run.pairs(), run.readers)
    results = sum(run.budget.bits.values()) // 8
    exact = sum(t.numel * t.dtype.itemsize for t in run.found.of(Treatment.WHOLE))
    writing = 2 * results + 3 * exact
    if run.compute.is_cuda:
        sampling, at_work = _sampling_beside_gpu(run), _beside_gpu(run)
    else:
        reading = max(reading, survey_bytes(shapes))
        sampling = _sampling_memory(run) if run.samples else 0
        at_work = _working_memory(run, held + 2 * results, writing)
    stages = {"read": reading}
    if run.samples:
        stages["calibration tokens"] = sampling
    stages |= {"calibration and compression": 2 * results + at_work,
               "writing": 2 * results + writing}
    # On a GPU the bound is one on reading alone.
    limit = None if run.compute.is_cuda else run.limit
    return {stage: min(held + taken, limit or held + taken) for stage, taken in stages.items()}


def _job_bits(run: Foreseen, target: Target) -> int:
    """The most bits that a matrix can get."""
    headroom = SPREAD if run.config.allocate == "model" else 1
    return headroom * run.budget.bits[target.name]


def _sampling_memory(run: Foreseen) -> int:
    config, (_, length), threads = run.model.config, run.tokens, run.threads
    shapes = run.shapes.values()
    if run.limit is not None:
        threads = sampling_threads(run.limit, shapes, config, length, threads)
    chunks = min(threads, sampling_chunks(config, run.tokens))
    return sampling_bytes(shapes, run.threads) + chunks * chunk_bytes(config, length)


def _working_memory(run: Foreseen, held: int, writing: int) -> int:
    handled = run.sizes()
    largest = max((matrix_bytes(t.shape, _job_bits(run, t), run.config)
                   for t in run.matrices), default=0)
    if run.limit is not None:
        plan_memory(run.limit, held, handled, largest, writing, run.threads)
    grams: Counter[int] = Counter()
    for group in run.groups:
        grams[_block_of(group[0])] += 4 * group[0].shape[1] ** 2
    return unbounded_bytes(handled, max(grams.values(), default=0), largest, run.threads)


# --- a GPU's memory, and the host's beside it -----------------------------------------------------


def gpu_bytes(run: Foreseen) -> int:
    """The most that the run holds of a GPU; 0 on the CPU."""
    if not run.compute.is_cuda:
        return 0
    grams: Counter[int] = Counter()  # as compress plans it: as if none were shared
    inputs = {run.architecture.input_of(t.name): t for t in run.matrices if run.is_calibrated(t)}
    for target in inputs.values():
        grams[_block_of(target)] += 4 * target.shape[1] ** 2
    most, found = max(grams.values(), default=0), run.sizes()
    jobs = [_job(run, group) for group in run.groups]
    plan = plan_device(run.compute, found, most, max((job.size for job in jobs), default=0))
    taken = calibrating_bytes(run.compute, plan, found, most, jobs)
    if run.samples:
        numels = list(map(math.prod, run.shapes.values()))
        taken = max(taken, sampling_device_bytes(run.compute, numels, run.model.config,
                                                 run.tokens[1]))
    return with_workspaces(taken)


def _job(run: Foreseen, group: list[Target]) -> Job:
    sizes = [matrix_device_bytes(t.shape, t.dtype.itemsize, _job_bits(run, t), run.config,
                                 weighted=t.treatment is Treatment.EMBEDDING) for t in group]
    calibrated = run.is_calibrated(group[0])
    return Job(max(sizes), 4 * group[0].shape[1] ** 2 if calibrated else 0)


def _sampling_beside_gpu(run: Foreseen) -> int:
    """The host's memory while a GPU gets the model: tensor by tensor, or all at once."""
    tensors = ModelTensors(run.sources[1], run.architecture.parts)
    by_tensor = all(tensors.shapes.get(name) == tuple(tensor.shape)
                    for name, tensor in own_tensors(run.model))
    whole = run.compute.dtype.itemsize * sum(map(math.prod, run.shapes.values()))
    return _largest_parameter(run) + (0 if by_tensor else whole)


def _beside_gpu(run: Foreseen) -> int:
    """The host's memory while a GPU calibrates and compresses."""
    base = run.sources[0].headers
    pairs = [t.numel * (t.dtype.itemsize + base[t.stack or t.name][1].itemsize)
             for t in run.matrices]
    return host_bytes(pairs, _largest_parameter(run))


def _largest_parameter(run: Foreseen) -> int:
    """Bytes of the model's largest, and of a part where it is put together."""
    headers = run.sources[1].headers.values()
    whole = ModelTensors(run.sources[1], run.architecture.parts).shapes.values()
    itemsize = max(dtype.itemsize for _, dtype in headers)
    part = max(math.prod(shape) for shape, _ in headers) if run.architecture.experts else 0
    return itemsize * (max(map(math.prod, whole), default=0) + part)


def _block_of(target: Target) -> int:
    return next(iter(index_of(target.name)), -1)
