"""What the steps of a compression take at most, and how a run keeps to a bound.

Every figure is in bytes and an upper bound: counted from the arrays that are alive at once in the
code that it stands for (`python_tests/test_memory.py` measures them).
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from adamix.calibration.gram import CHUNK, MAX_GRAM_BYTES
from adamix.calibration.sampling import chunk_bytes
from adamix.calibration.sums import ALONE
from adamix.compression.matrix import component_bits
from adamix.compression.simulate import AT_A_TIME
from adamix.config import Config
from adamix.costs import activation_bytes
from adamix.errors import CalibrationError, MemoryLimitError
from adamix.naming import index_of

ARENA_BYTES = 64 * 2**20  # what a thread's allocator keeps of small arrays that were freed


def resident_bytes() -> int:
    """What this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def matrix_bytes(shape: tuple[int, int], budget_bits: int, config: Config) -> int:
    """Compressing one matrix `[out, in]`, its inputs' Gram matrix and Hessian included."""
    out, n = shape
    least = component_bits(shape, min(config.bit_widths))
    candidates = min(budget_bits // least, out, n)
    lanes = candidates * len(config.bit_widths)
    weights = out * n
    # The Gram matrix in fp32, and at once matrix, lower, inverse, its factor in fp64 and in fp32.
    hessian = 4 * n * n + 36 * n * n
    kept = 4 * n * n + 20 * n * n
    pair = 2 * 4 * weights + 4 * weights  # both sides (fp32 at most), and their difference
    doubles = 8 * 3 * weights  # ΔW, weighted by rows, and one product of it
    decompose = doubles + 8 * 5 * min(out, n) ** 2
    columns = 12 * candidates * out + 24 * max(AT_A_TIME["cpu"], len(config.bit_widths) * out)
    # GPTQ on all rows; then their codes beside one width's error, or beside columns of U. What the
    # allocation takes after that, at most 64 MiB, is less.
    simulate = doubles + max(18 * n * lanes, n * (lanes + 40 * candidates),
                             10 * n * lanes + columns)
    error = 8 * 3 * weights + 8 * n * n
    return max(hessian, kept + pair + max(decompose, simulate, error))


def survey_bytes(shapes: Iterable[tuple[int, ...]]) -> int:
    """Reading both models: the largest pair as stored, what it is compared by, and the masks of a
    test."""
    return 12 * max(map(math.prod, shapes), default=0)


def check_survey(limit: int, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse a bound that reading a tensor of both models breaks.

    Raises:
        MemoryLimitError: the sentence says what would do.
    """
    needed = resident_bytes() + survey_bytes(shapes)
    if needed > limit:
        raise MemoryLimitError(f"--max-memory of {limit / 1e9:.2f} GB is too little: reading the "
                               f"largest tensor of both models takes {needed / 1e9:.2f} GB")


def sampling_bytes(shapes: Iterable[tuple[int, ...]], threads: int) -> int:
    """A model that writes its own text, as it is loaded; the text itself comes on top of it."""
    numels = [math.prod(shape) for shape in shapes]
    return 4 * sum(numels) + 8 * max(numels) + ARENA_BYTES * (threads + 1)


def sampling_threads(limit: int, shapes: Iterable[tuple[int, ...]], config: PretrainedConfig,
                     length: int, threads: int) -> int:
    """How many chunks of text the model can write at a time.

    Raises:
        CalibrationError: none.
    """
    fixed = resident_bytes() + sampling_bytes(shapes, threads)
    chunk = chunk_bytes(config, length)
    if fixed + chunk > limit:
        raise CalibrationError(
            f"a model takes {(fixed + chunk) / 1e9:.2f} GB to write the calibration text, and "
            f"--max-memory is {limit / 1e9:.2f} GB: give --calibration FILE")
    return min(threads, (limit - fixed) // chunk)


@dataclass(frozen=True)
class Sizes:
    """What a model's calibration handles."""

    states: int  # hidden states of all tokens, fp32
    resident: int  # the largest part of the model that is in memory at a time
    block: int  # that part while Gram matrices are made, fp32
    widest: int  # inputs of the widest layer asked for; 0 where none is
    activations: int  # of one chunk


def sizes(shapes: Mapping[str, tuple[int, ...]], asked: Collection[tuple[int, int]], hidden: int,
          tokens: tuple[int, int], *, whole: bool, experts: Collection[str] = ()) -> Sizes:
    """Counted from the shapes of a checkpoint's tensors.

    Args:
        shapes: by name.
        asked: (out, in) of the weights whose inputs are asked for.
        hidden: size of a hidden state.
        tokens: sequences and their length.
        whole: the model is in memory whole, as for its own text.
        experts: names of those tensors that are experts'; one expert at a time is run.
    """
    by_block: dict[int, int] = {}
    outputs: dict[int, int] = {}
    in_block: dict[int, int] = {}  # of experts
    outside, expert = [0], 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        if index_of(name):
            block = index_of(name)[0]
            by_block[block] = by_block.get(block, 0) + numel
            if name in experts:  # its inputs, outputs, what is made of them, and their weighted sum
                expert = max(expert, 4 * sum(shape[-2:]))
                in_block[block] = in_block.get(block, 0) + numel
            else:
                outputs[block] = outputs.get(block, 0) + (shape[0] if len(shape) == 2 else 0)
        else:
            outside.append(numel)
    chunk = min(CHUNK, tokens[0]) * tokens[1]
    total = sum(by_block.values()) + sum(outside)
    widest = max((shape[1] for shape in asked), default=0)
    activations = activation_bytes(chunk, max(outputs.values(), default=0), hidden, expert)
    if whole:  # where the head's inputs are asked for, its outputs come too
        activations += 4 * 2 * chunk * max((shape[0] for shape in asked), default=0)
    # a layer's experts put together as they were read, and the sum of their Gram matrices
    stacks = 2 * max(in_block.values(), default=0) + (4 * widest**2 if experts else 0)
    block = 4 * (total if whole else max(by_block.values(), default=0))
    return Sizes(
        states=0 if whole else 4 * tokens[0] * tokens[1] * hidden,
        # fp32; of what is not in the blocks, an embedding as a rule, also as it was read
        resident=max(block, 0 if whole else 8 * max(outside)) + stacks, block=block + stacks,
        widest=widest, activations=activations)


@dataclass(frozen=True)
class MemoryPlan:
    """How a run keeps to its bound, or to MAX_GRAM_BYTES of Gram matrices where it has none."""

    free: int | None  # for calibrating and compressing together; None: no bound
    grams: int  # Gram matrices in the making
    making: int  # those and the activations beside them
    threads: int  # chunks of tokens at a time
    states_on_disk: bool

    @classmethod
    def unbounded(cls, threads: int) -> MemoryPlan:
        """Without a bound of the user's."""
        half = MAX_GRAM_BYTES // 2
        return cls(None, half, half, threads, False)


def plan_memory(limit: int, held: int, found: Sizes, largest_job: int, writing: int, threads: int,
                sums: int = ALONE.at_once) -> MemoryPlan:
    """Share a bound out.

    Args:
        limit: of the whole process.
        held: by the process already, and by what it will keep to its end.
        found: what calibrating handles.
        largest_job: of `matrix_bytes`.
        writing: what the output takes while it is written, when all else is over.
        threads: at most.
        sums: of one Gram matrix that are alive at a time.

    Raises:
        MemoryLimitError: not even one matrix at a time fits; the sentence says what would.
    """
    gram = 4 * found.widest**2
    # The sums, a chunk's part, and the product in the making (or another process's sum).
    least = (sums + 2) * gram + found.activations
    needed = max(found.resident + max(least, largest_job + gram), writing)
    fixed = held + ARENA_BYTES * (threads + 1)
    on_disk = fixed + found.states + needed > limit or 3 * found.states > limit - fixed
    if fixed + needed > limit:
        raise MemoryLimitError(
            f"--max-memory of {limit / 1e9:.2f} GB is too little: one matrix at a time takes "
            f"{(fixed + needed) / 1e9:.2f} GB")
    free = limit - fixed - found.resident - (0 if on_disk else found.states)
    making = max(least, min(free // 3, free - largest_job))
    a_chunk = found.activations + gram
    room = min(making // 2, making - (sums + 1) * gram)  # for chunks, at least one
    at_a_time = max(1, min(threads, room // max(a_chunk, 1)))
    return MemoryPlan(free, making - at_a_time * a_chunk, making, at_a_time, on_disk)


def unbounded_bytes(found: Sizes, grams: int, largest_job: int, threads: int) -> int:
    """What calibrating and compressing take together where no bound is given.

    Args:
        found: what calibrating handles.
        grams: Gram matrices of the block that has most of them, one of each.
        largest_job: of `matrix_bytes`.
        threads: at a time.
    """
    gram = 4 * found.widest**2
    most = MemoryPlan.unbounded(threads).grams
    sums = ALONE.at_once
    making = max(min((threads + sums) * grams, most), (sums + 1) * gram)
    waiting = min(2 * threads, most // max(gram, 1)) * gram + gram
    at_work = threads * max(largest_job, found.activations + gram)
    return (found.resident + found.states + making + waiting + at_work
            + ARENA_BYTES * (threads + 1))
