"""estimate: what a compression would take, from the headers and configs of both checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from adamix.budget import plan_budget
from adamix.calibration.gram import shared_inputs
from adamix.calibration.layers import find_layers
from adamix.calibration.token_ids import Source, given_ids
from adamix.compression.matrix import component_bits
from adamix.config import Config
from adamix.costs import (
    Work,
    calibration_work,
    hessian_work,
    matrix_work,
    measuring_work,
    sampling_chunks,
    sampling_work,
)
from adamix.devices import find_compute
from adamix.estimation_gpu import taking_turns
from adamix.foreseen import Foreseen
from adamix.foreseen_memory import gpu_bytes, host_memory
from adamix.naming import index_of
from adamix.parallel import available_cores, workers
from adamix.pipeline import manifest_of
from adamix.rates import measure, measure_gpu
from adamix.source.architecture import Architecture, describe
from adamix.source.checkpoints import Checkpoint, context_of
from adamix.source.models import empty_model
from adamix.source.targets import Survey, Target, Treatment, check_pair, presumed_survey
from adamix.tokens import origin_of, writers


@dataclass(frozen=True)
class Estimate:
    """What `compress` would take, if every tensor of the fine-tune differs from the base's."""

    bytes: int  # delta.safetensors + delta_config.json
    bytes_16bit: int  # of all tensors that differ
    whole: dict[str, int]  # bytes of tensors kept whole, norms and biases left out
    matrices: int  # that are compressed
    seconds: dict[str, float]  # by stage
    memory: dict[str, int]  # of the process, by stage, at most
    gpu_bytes: int  # that compress holds of a GPU at most; 0: it works on the CPU
    threads: int
    device: str = "cpu"  # or the GPU's name

    @property
    def ratio(self) -> float:
        """16-bit bytes of what differs over bytes on disk."""
        return self.bytes_16bit / self.bytes

    @property
    def total_seconds(self) -> float:
        """Of all stages."""
        return sum(self.seconds.values())

    @property
    def peak_bytes(self) -> int:
        """The most memory that the process holds in any stage."""
        return max(self.memory.values())


def estimate(base: str | Path, finetuned: str | Path, config: Config | None = None, *,
             calibration: Source | None = None, threads: int | None = None,
             device: str | torch.device | None = None, max_memory: int | None = None) -> Estimate:
    """Time, memory and output size of a `compress` with the same arguments, in a few seconds.

    Of both checkpoints only headers and configs are read, so every tensor of the fine-tune counts
    as one that differs: where a part was frozen, all figures are upper bounds. The seconds are
    those of a cost model with this machine's rates, which are measured meanwhile, on the device
    that would do the work. A GPU's memory is that of arrays, without what its allocator keeps free.

    Args:
        base, finetuned, config, threads, device, max_memory: as in `compress`.
        calibration: as in `compress`; text is not read, it counts as
            `config.calibration_sequences` sequences.

    Raises:
        AdamixError: a subclass names in one sentence what `compress` would refuse.
    """
    config, threads = config or Config(), threads or available_cores()
    sources = Checkpoint(base), Checkpoint(finetuned)
    architecture = describe(sources[1].folder, sources[1].names)
    check_pair(*sources, architecture)
    found = presumed_survey(*sources, architecture, compress_embeddings=config.embeddings,
                            compress_vision=config.vision)
    tokens = _tokens(sources[1], config, calibration, architecture.vocabulary)
    origin = origin_of(calibration, config) | {"sequences": tokens[0], "length": tokens[1]}
    manifest = manifest_of(sources, found, config, origin)
    budget = plan_budget(found, manifest, config)
    model = empty_model(sources[1].folder).eval()
    compute = find_compute(device, [dtype for _, dtype in sources[1].headers.values()])
    run = Foreseen(sources, found, architecture, config, budget, tokens, calibration is None,
                   threads, compute, max_memory, model, _groups(model, found, architecture))
    # Measuring loads a GPU's libraries, which this process then holds as compress does.
    seconds = _seconds(run) if compute.is_cuda else {}
    memory = host_memory(run)
    return Estimate(
        run.written(manifest), budget.bytes_16bit,
        {t.name: t.numel * t.dtype.itemsize for t in found.of(Treatment.WHOLE) if len(t.shape) > 1},
        len(budget.bits), seconds or _seconds(run), memory, gpu_bytes(run), threads,
        compute.label)


def _tokens(finetuned: Checkpoint, config: Config, calibration: Source | None, vocabulary: int
            ) -> tuple[int, int]:
    """Sequences and their length."""
    limit = context_of(finetuned)
    if calibration is not None:
        given = given_ids(calibration, vocabulary=vocabulary, longest=limit)
        if given is not None:
            return given.shape[0], given.shape[1]
    return config.calibration_sequences, min(config.calibration_length, limit or math.inf)


def _groups(model: PreTrainedModel, found: Survey, architecture: Architecture
            ) -> list[list[Target]]:
    """The matrices that read one input each, as the model's code calls them on the meta device;
    where it does not run there, every matrix for itself."""
    users: dict[str, list[Target]] = {}
    for target in found.of(Treatment.LINEAR):
        users.setdefault(architecture.input_of(target.name), []).append(target)
    for target in found.of(Treatment.EMBEDDING) if architecture.tied else ():
        users[architecture.input_of(architecture.head or "")] = [target]
    try:
        called = shared_inputs(model, torch.zeros(1, 8, dtype=torch.long),
                               find_layers(model, users))
    except Exception:  # the code of any model runs here
        called = {}
    groups = [[t for name in names for t in users.pop(name)] for names in called.values()]
    alone = [] if architecture.tied else [[t] for t in found.of(Treatment.EMBEDDING)]
    return groups + [*users.values(), *alone]


def _seconds(run: Foreseen) -> dict[str, float]:
    """Seconds by stage."""
    rates, forward = _rates(run)
    shapes = [headers for source in run.sources for headers in source.headers.values()]
    stored = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
    slowest = max(stored / run.readers, max(run.pairs().values(), default=0))
    seconds = {"read": Work(surveyed=slowest).seconds(rates)}
    if run.samples:
        seconds["calibration tokens"] = _sampling_seconds(run, forward)
    calibration = _calibration_work(run).seconds(forward)
    if run.config.allocate == "model":
        seconds["sharing the budget out"] = _side_by_side(
            run, [_measuring_work(run, group) for group in run.groups], calibration, rates)
    seconds["calibration and compression"] = _side_by_side(
        run, [_group_work(run, group) for group in run.groups], calibration, rates)
    return seconds


def _rates(run: Foreseen) -> tuple[Work, Work]:
    """Of the matrices' work, and of forward passes."""
    common = Counter(target.shape for target in run.matrices).most_common(1)
    out, n = common[0][0] if common else (1, 1)
    least = component_bits((out, n), min(run.config.bit_widths))
    lanes = run.config.budget_bits((out, n)) // least * len(run.config.bit_widths)
    config, tokens = run.model.config, run.tokens
    with workers(run.threads) as executor:
        if run.compute.is_cuda:
            widest = max((target.shape[1] for target in run.matrices), default=1)
            return measure_gpu(run.compute, config, tokens, n, lanes, widest, executor,
                               run.threads)
        rates = measure(config, tokens, n, lanes, executor, run.threads)
        return rates, rates


def _side_by_side(run: Foreseen, groups: list[Work], calibration: float, rates: Work) -> float:
    """Calibration and the work on what reads each input, on all threads or on the GPU."""
    if run.compute.is_cuda:
        return taking_turns(groups, calibration, rates)
    each = [group.seconds(rates) for group in groups]
    return max((sum(each) + calibration) / run.threads, *each, 0.0)


def _sampling_seconds(run: Foreseen, rates: Work) -> float:
    names = {*run.architecture.linears, run.architecture.head or ""}
    weights = sum(math.prod(run.shapes[name]) for name in names & run.shapes.keys())
    if run.architecture.tied:
        weights += math.prod(run.shapes[run.architecture.embedding or ""])
    config, gpu = run.model.config, run.compute.is_cuda
    seconds, threads = 0.0, 1 if gpu else run.threads
    for sequences in filter(None, writers(run.config)):
        tokens = sequences, run.tokens[1]
        chunk = sampling_work(weights, config, tokens, gpu=gpu).seconds(rates)
        seconds += -(-sampling_chunks(config, tokens, gpu=gpu) // threads) * chunk
    return seconds


def _calibration_work(run: Foreseen) -> Work:
    in_blocks = {name: shape for name, shape in run.shapes.items()
                 if name in run.architecture.linears and index_of(name)}
    inputs = [group[0].shape[1] for group in run.groups if run.is_calibrated(group[0])]
    return calibration_work(in_blocks, inputs, len({index_of(name)[0] for name in in_blocks}),
                            run.tokens, run.sizes().activations)


def _group_work(run: Foreseen, group: list[Target]) -> Work:
    parts = [matrix_work(t.shape, run.planned_bits(t), run.config) for t in group]
    return sum(parts, _hessian_work(run, group))


def _measuring_work(run: Foreseen, group: list[Target]) -> Work:
    return sum([measuring_work(t.shape) for t in group], _hessian_work(run, group))


def _hessian_work(run: Foreseen, group: list[Target]) -> Work:
    return hessian_work(group[0].shape[1]) if run.is_calibrated(group[0]) else Work()
