"""What a compression takes of a GPU, and of the host beside it, by the way that it plans."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import combinations_with_replacement

from transformers import PretrainedConfig

from adamix.calibration.sampling import chunk_bytes
from adamix.costs import Work
from adamix.devices import JOBS, Compute, held_bytes
from adamix.memory import ARENA_BYTES, MemoryPlan, Sizes

# What cuBLAS and cuBLASLt take for each thread that multiplies: on Hopper 32 MiB each.
WORKSPACE_BYTES = 64 * 2**20
THREADS = JOBS + 2  # that do: the jobs', the calibration's, and the main one


@dataclass(frozen=True)
class Job:
    """A group of matrices that read one input, compressed one after the other."""

    size: int  # bytes, of `matrix_device_bytes`
    gram: int  # bytes of its inputs' Gram matrix; 0 where it has none


def calibrating_bytes(compute: Compute, plan: MemoryPlan, found: Sizes, grams: int,
                      jobs: Iterable[Job]) -> int:
    """The most of a GPU that calibrating and compressing hold at a time.

    So many jobs run side by side as are counted as no more than `plan.free`; others wait with their
    Gram matrices. Blocks are calibrated meanwhile where `plan.making` is left for it.

    Args:
        compute: the GPU.
        plan: of `plan_device`.
        found: what calibrating handles, counted in fp32.
        grams: bytes of the Gram matrices of the block that has most of them.
        jobs: all of them.
    """
    states = held_bytes(compute, found)
    counts, most = Counter(jobs), plan.making
    waiting = sum(job.gram * count for job, count in counts.items())
    share = max((job.gram / job.size for job in counts), default=0.0)
    for job in list(counts):
        if not job.gram and job.size > plan.free - plan.making:
            most = max(most, job.size - states)  # it comes first, and all else after it
            del counts[job]
    for number in range(1, JOBS + 1):
        for running in combinations_with_replacement(counts, number):
            left = plan.free - sum(job.size for job in running)
            alike = Counter(running)
            if (left < 0 and number > 1) or any(alike[job] > counts[job] for job in alike):
                continue
            beside = plan.making if left >= plan.making else grams
            queued = min(waiting, share * max(left - beside, 0))
            most = max(most, sum(job.size for job in running) + beside + int(queued))
    return states + most


def sampling_device_bytes(compute: Compute, numels: Sequence[int], config: PretrainedConfig,
                          length: int) -> int:
    """Of a GPU, while the model is there whole and writes one chunk of text.

    Args:
        numels: of the model's tensors.
    """
    weights = compute.dtype.itemsize * (sum(numels) + max(numels, default=0))
    return weights + chunk_bytes(config, length, gpu=True, itemsize=compute.dtype.itemsize)


def with_workspaces(taken: int) -> int:
    """And what its libraries take for each thread."""
    return taken + THREADS * WORKSPACE_BYTES


# --- the host beside it --------------------------------------------------------------------------


def reading_bytes(pairs: Mapping[str, int], threads: int) -> int:
    """Of the host, while both models are read: files are mapped, and count as they are read; each
    side for its hash, both for their comparison.

    Args:
        pairs: bytes of both sides of each tensor, by name.
        threads: of those at a time; one has a whole tensor.
    """
    parts = [part for pair in pairs.values() for part in (pair / 2, pair / 2, pair)]
    return math.ceil(sum(nlargest(threads, parts)))


def host_bytes(pairs: Iterable[int], largest: int) -> int:
    """Of the host, while a GPU calibrates and compresses, beside the results.

    Args:
        pairs: bytes of both sides of each matrix, on their way to the GPU.
        largest: bytes of the model's largest parameter, on its way there too.
    """
    return sum(nlargest(JOBS, pairs)) + largest + ARENA_BYTES * THREADS


# --- time ----------------------------------------------------------------------------------------


def taking_turns(groups: Sequence[Work], calibration: float, rates: Work) -> float:
    """Seconds of jobs that take turns on one GPU, while others wait for integer programs.

    Args:
        groups: the work of each job.
        calibration: seconds of the forward passes, on the same GPU.
        rates: seconds an operation.
    """
    programs = [group.candidates * rates.candidates for group in groups]
    each = [group.seconds(rates) for group in groups]
    return max(sum(each) - sum(programs) + calibration, sum(programs) / JOBS, *each, 0.0)
