"""The matrices of a model, one after the other: calibrated, compressed, and kept as finished."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adamix.artifacts import Hessian, WeightPair
from adamix.calibration.gram import MAX_GRAM_BYTES, accumulate, passes, shared_inputs
from adamix.compression.error import relative_error
from adamix.compression.hessian import hessian, identity
from adamix.compression.matrix import quantize_matrix
from adamix.config import Config
from adamix.errors import AdamixError, NonFiniteError
from adamix.progress import Progress, timed
from adamix.source.architecture import Architecture
from adamix.source.checkpoints import Checkpoint
from adamix.source.models import load_model
from adamix.source.targets import Survey, Target, Treatment, read_pair
from adamix.storage.log import MatrixRow, Spectrum
from adamix.storage.pack import pack
from adamix.storage.work import CompressedMatrix, WorkFolder

FREQUENCY_FLOOR = 0.01  # of the mean token frequency: what the row of an unseen token weighs


@dataclass(frozen=True)
class MatrixRun:
    """The calibration and compression of one model's matrices."""

    sources: tuple[Checkpoint, Checkpoint]
    found: Survey
    architecture: Architecture
    config: Config
    budget_bits: dict[str, int]
    work: WorkFolder
    executor: Executor
    threads: int
    progress: Progress
    seconds: dict[str, float]

    def matrices(self, tokens: Tensor, finished: dict[str, CompressedMatrix]
                 ) -> dict[str, CompressedMatrix]:
        """Every compressed matrix by name, sorted.

        Args:
            tokens: int64 `[sequences, length]`.
            finished: what an earlier run has done.
        """
        done = dict(finished)
        frequency = token_frequency(tokens, self.architecture.vocabulary)
        if self._open_targets(done):
            self._calibrated(load_model(self.sources[1].folder), tokens, frequency, done)
        # An embedding, whose inputs are one-hot, and modules that the model never calls.
        rest = [(None, [target]) for target in self._open_targets(done)]
        if rest:
            self._compress(rest, frequency, done)
        return {name: done[name] for name in sorted(done)}

    def _open_targets(self, done: dict[str, CompressedMatrix]) -> list[Target]:
        """The matrices that are not finished."""
        return [target for target in self.found.of(Treatment.LINEAR, Treatment.EMBEDDING)
                if target.name not in done]

    def _calibrated(self, model: nn.Module, tokens: Tensor, frequency: Tensor,
                    done: dict[str, CompressedMatrix]) -> None:
        """Compress the matrices that the whole model's forward pass reaches."""
        linears = self._linears(model)
        targets = {leader: self._targets_of(modules, done)
                   for leader, modules in shared_inputs(model, tokens, linears).items()}
        widths = {leader: linears[leader].in_features for leader in targets if targets[leader]}
        for run in passes(widths, MAX_GRAM_BYTES // (self.threads + 1)):
            with timed(self.seconds, "calibration"):
                self.progress.stage("calibrating", len(tokens))
                grams = accumulate(model, tokens, {leader: linears[leader] for leader in run},
                                   executor=self.executor, ahead=self.threads,
                                   on_chunk=self.progress.advance)
            self._compress([(grams[leader], targets[leader]) for leader in run], frequency, done)

    def _linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The modules whose inputs are needed, by name."""
        wanted = {_module(target.name) for target in self.found.of(Treatment.LINEAR)}
        if self.architecture.tied and self.found.of(Treatment.EMBEDDING):
            wanted.add(_module(self.architecture.head or ""))
        return {name: module for name, module in model.named_modules() if name in wanted}

    def _targets_of(self, modules: list[str], done: dict[str, CompressedMatrix]) -> list[Target]:
        """What is still to be compressed of the modules that share an input."""
        names = {f"{module}.weight" for module in modules}
        if self.architecture.tied and self.architecture.head in names:
            names.add(self.architecture.embedding or "")
        return [target for target in self._open_targets(done) if target.name in names]

    def _compress(self, jobs: list[tuple[Tensor | None, list[Target]]], frequency: Tensor,
                  done: dict[str, CompressedMatrix]) -> None:
        with timed(self.seconds, "compression"):
            self.progress.stage("compressing", sum(len(targets) for _, targets in jobs))
            # The largest first, so that none of them is left alone at the end.
            jobs = sorted(jobs, key=lambda job: -max(self.budget_bits[t.name] for t in job[1]))
            futures = [self.executor.submit(self._compress_group, gram, targets, frequency)
                       for gram, targets in jobs]
            for future in as_completed(futures):
                done.update(future.result())

    def _compress_group(self, gram: Tensor | None, targets: list[Target], frequency: Tensor
                        ) -> dict[str, CompressedMatrix]:
        """The matrices that read one input, one after the other."""
        n = targets[0].shape[1]
        if gram is not None and not gram.any():  # nothing ever reached it: any input counts alike
            gram = None
        with _named(targets[0].name):
            H = identity(n) if gram is None else hessian(gram, self.config.damping)
        compressed = {}
        for target in targets:
            weights = frequency if target.treatment is Treatment.EMBEDDING else None
            pair = read_pair(*self.sources, target)
            with _named(target.name):
                matrix = self._compress_pair(pair, H, gram, weights)
            self.work.keep(matrix)
            compressed[target.name] = matrix
            self.progress.advance()
        return compressed

    def _compress_pair(self, pair: WeightPair, H: Hessian, gram: Tensor | None,
                       frequency: Tensor | None) -> CompressedMatrix:
        start = time.perf_counter()
        weights = None if frequency is None else frequency[: pair.base.shape[0]]
        result = quantize_matrix(pair.delta, H, self.config, row_weights=weights,
                                 budget_bits=self.budget_bits[pair.name])
        packed = pack(result.delta)
        error = relative_error(pair.delta, packed.dequantize(), gram, weights)
        if not math.isfinite(error):
            raise NonFiniteError(f"its relative error is {error}")
        row = MatrixRow.of(pair.name, packed, error, time.perf_counter() - start)
        spectrum = Spectrum(result.singular_values, result.errors, result.widths)
        return CompressedMatrix(packed, row, spectrum)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the tensor's name before a fault in the block, and make it one of ours."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # LinAlgError is a RuntimeError
        kind = type(error) if isinstance(error, AdamixError) else AdamixError
        raise kind(f"{name} cannot be compressed: {error}") from error


def token_frequency(tokens: Tensor, vocabulary: int) -> Tensor:
    """How often each token occurs, plus 1 % of the mean: what an embedding's rows weigh, fp64."""
    counts = torch.bincount(tokens.flatten(), minlength=vocabulary).double()
    return counts + FREQUENCY_FLOOR * counts.mean()


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
