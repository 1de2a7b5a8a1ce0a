"""estimate: what a compression would take, from the headers and configs of both checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from adamix import ops
from adamix.artifacts import Manifest
from adamix.budget import Budget, plan_budget
from adamix.calibration.gram import shared_inputs
from adamix.calibration.layers import find_layers
from adamix.calibration.sampling import chunk_bytes
from adamix.calibration.token_ids import Source, given_ids
from adamix.compression.matrix import component_bits
from adamix.compression.share import SPREAD
from adamix.config import Config
from adamix.costs import (
    Work,
    calibration_work,
    hessian_work,
    matrix_work,
    measuring_work,
    planned_bits,
    planned_rank,
    sampling_chunks,
    sampling_work,
)
from adamix.memory import (
    Sizes,
    check_survey,
    matrix_bytes,
    plan_memory,
    resident_bytes,
    sampling_bytes,
    sampling_threads,
    sizes,
    survey_bytes,
    unbounded_bytes,
)
from adamix.naming import group_by_kind, index_of
from adamix.parallel import available_cores, workers
from adamix.pipeline import context_of, manifest_of, origin_of
from adamix.rates import measure
from adamix.source.architecture import Architecture, describe
from adamix.source.checkpoints import Checkpoint
from adamix.source.models import empty_model
from adamix.source.targets import Survey, Target, Treatment, check_pair, presumed_survey
from adamix.storage.file import file_bytes, manifest_text


@dataclass(frozen=True)
class Estimate:
    """What `compress` would take, if every tensor of the fine-tune differs from the base's."""

    bytes: int  # delta.safetensors + delta_config.json
    bytes_16bit: int  # of all tensors that differ
    whole: dict[str, int]  # bytes of tensors kept whole, norms and biases left out
    matrices: int  # that are compressed
    seconds: dict[str, float]  # by stage
    memory: dict[str, int]  # of the process, by stage, at most
    gpu_bytes: int  # 0: compress works on the CPU
    threads: int

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
             max_memory: int | None = None) -> Estimate:
    """Time, memory and output size of a `compress` with the same arguments, in a few seconds.

    Of both checkpoints only headers and configs are read, so every tensor of the fine-tune counts
    as one that differs: where a part was frozen, all figures are upper bounds. The seconds are
    those of a cost model with this machine's rates, which are measured meanwhile.

    Args:
        base, finetuned, config, threads, max_memory: as in `compress`.
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
    run = _Run(sources, found, architecture, config, budget, tokens, calibration is None, threads,
               model, _groups(model, found, architecture))
    memory = run.memory(max_memory)
    return Estimate(
        run.written(manifest), budget.bytes_16bit,
        {t.name: t.numel * t.dtype.itemsize for t in found.of(Treatment.WHOLE) if len(t.shape) > 1},
        len(budget.bits), run.seconds(), memory, 0, threads)


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


@dataclass(frozen=True)
class _Run:
    """A compression that is not done."""

    sources: tuple[Checkpoint, Checkpoint]
    found: Survey
    architecture: Architecture
    config: Config
    budget: Budget
    tokens: tuple[int, int]
    samples: bool  # the model writes the calibration text itself
    threads: int
    model: PreTrainedModel  # on the meta device
    groups: list[list[Target]]  # the matrices that read one input each

    @property
    def matrices(self) -> list[Target]:
        return [target for group in self.groups for target in group]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self.sources[1].headers.items()}

    def sizes(self) -> Sizes:
        """What calibrating handles."""
        asked = [t.shape for t in self.matrices if self._is_calibrated(t)]
        return sizes(self.shapes, asked, self.architecture.hidden, self.tokens, whole=False,
                     experts=self.architecture.experts)

    def _is_calibrated(self, target: Target) -> bool:
        """An embedding's inputs are one-hot, unless it is the head too."""
        return target.treatment is Treatment.LINEAR or self.architecture.tied

    def written(self, manifest: Manifest) -> int:
        """Bytes of `delta.safetensors` and `delta_config.json`."""
        matrices = {t.name: t for t in self.matrices}
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for kind, names in group_by_kind({name: t.shape for name, t in matrices.items()}).items():
            args = [(matrices[name].shape, self._planned(matrices[name]), self.config)
                    for name in names]
            rank = sum(planned_rank(*arg) for arg in args)
            words = sum(planned_bits(*arg) for arg in args) // 32 - rank
            tensors |= {f"{kind}.words": (torch.int32, (words,)),
                        f"{kind}.scales": (torch.float32, (rank,)),
                        f"{kind}.counts": (torch.int32, (len(names), ops.MAX_BITS))}
        whole = {t.name: (t.shape, t.dtype) for t in self.found.of(Treatment.WHOLE)}
        for kind, names in group_by_kind(whole).items():
            shape, dtype = whole[names[0]]
            tensors[f"whole:{kind}"] = dtype, (len(names), *shape)
        for t in self.found.targets:
            if t.extra_rows:
                tensors[f"rows:{t.name}"] = t.dtype, (t.extra_rows, *t.shape[1:])
        return file_bytes(tensors) + len(manifest_text(manifest).encode())

    def _planned(self, target: Target) -> int:
        """The bits of a matrix; of one budget for all, what an even share of it would be."""
        bits, shape = self.budget.bits[target.name], target.shape
        spared = component_bits(shape, 2) - component_bits(shape, 1)
        return bits if self.config.allocate == "matrix" else bits - spared

    # --- memory ----------------------------------------------------------------------------------

    def memory(self, limit: int | None) -> dict[str, int]:
        """Bytes of the process by stage. Raises MemoryLimitError, CalibrationError."""
        shapes = self.shapes
        held, threads = resident_bytes(), self.threads
        stages = {"read": held + survey_bytes(shapes.values())}
        if limit is not None:
            check_survey(limit, shapes.values())
        if self.samples:
            config, length = self.model.config, self.tokens[1]
            if limit is not None:
                threads = sampling_threads(limit, shapes.values(), config, length, threads)
            chunks = min(threads, sampling_chunks(config, self.tokens))
            stages["calibration tokens"] = (held + sampling_bytes(shapes.values(), self.threads)
                                            + chunks * chunk_bytes(config, length))
        handled = self.sizes()
        headroom = SPREAD if self.config.allocate == "model" else 1
        largest = max((matrix_bytes(t.shape, headroom * self.budget.bits[t.name], self.config)
                       for t in self.matrices), default=0)
        results = sum(self.budget.bits.values()) // 8
        exact = sum(t.numel * t.dtype.itemsize for t in self.found.of(Treatment.WHOLE))
        writing = 2 * results + 3 * exact
        if limit is not None:
            plan_memory(limit, held + 2 * results, handled, largest, writing, self.threads)
        grams: Counter[int] = Counter()
        for group in self.groups:
            grams[next(iter(index_of(group[0].name)), -1)] += 4 * group[0].shape[1] ** 2
        stages["calibration and compression"] = held + 2 * results + unbounded_bytes(
            handled, max(grams.values(), default=0), largest, self.threads)
        stages["writing"] = held + 2 * results + writing
        return {stage: min(taken, limit or taken) for stage, taken in stages.items()}

    # --- time ------------------------------------------------------------------------------------

    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        common = Counter(target.shape for target in self.matrices).most_common(1)
        out, n = common[0][0] if common else (1, 1)
        least = component_bits((out, n), min(self.config.bit_widths))
        lanes = self.config.budget_bits((out, n)) // least * len(self.config.bit_widths)
        with workers(self.threads) as executor:
            rates = measure(self.model.config, self.tokens, n, lanes, executor, self.threads)
        shapes = [headers for source in self.sources for headers in source.headers.values()]
        stored = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
        seconds = {"read": Work(surveyed=stored).seconds(rates)}
        if self.samples:
            seconds["calibration tokens"] = self._sampling_seconds(rates)
        if self.config.allocate == "model":
            seconds["sharing the budget out"] = self._side_by_side(
                [self._measuring_work(group) for group in self.groups], rates)
        seconds["calibration and compression"] = self._side_by_side(
            [self._group_work(group) for group in self.groups], rates)
        return seconds

    def _side_by_side(self, groups: list[Work], rates: Work) -> float:
        """Calibration and the work on what reads each input, on all threads."""
        each = [group.seconds(rates) for group in groups]
        total = (sum(each) + self._calibration_work().seconds(rates)) / self.threads
        return max(total, *each, 0.0)

    def _sampling_seconds(self, rates: Work) -> float:
        names = {*self.architecture.linears, self.architecture.head or ""}
        weights = sum(math.prod(self.shapes[name]) for name in names & self.shapes.keys())
        if self.architecture.tied:
            weights += math.prod(self.shapes[self.architecture.embedding or ""])
        config = self.model.config
        chunk = sampling_work(weights, config, self.tokens)
        chunks = sampling_chunks(config, self.tokens)
        return -(-chunks // self.threads) * chunk.seconds(rates)

    def _calibration_work(self) -> Work:
        in_blocks = {name: shape for name, shape in self.shapes.items()
                     if name in self.architecture.linears and index_of(name)}
        inputs = [group[0].shape[1] for group in self.groups if self._is_calibrated(group[0])]
        return calibration_work(in_blocks, inputs, len({index_of(name)[0] for name in in_blocks}),
                                self.tokens, self.sizes().activations)

    def _group_work(self, group: list[Target]) -> Work:
        parts = [matrix_work(t.shape, self._planned(t), self.config) for t in group]
        return sum(parts, self._hessian_work(group))

    def _measuring_work(self, group: list[Target]) -> Work:
        return sum([measuring_work(t.shape) for t in group], self._hessian_work(group))

    def _hessian_work(self, group: list[Target]) -> Work:
        return hessian_work(group[0].shape[1]) if self._is_calibrated(group[0]) else Work()
