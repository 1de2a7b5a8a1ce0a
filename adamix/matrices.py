"""The matrices of a model, one after the other: calibrated, compressed, and kept as finished."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adamix.artifacts import Hessian, WeightPair
from adamix.calibration.blocks import BlockStream, Unsuited
from adamix.calibration.gram import MAX_GRAM_BYTES, accumulate, passes, shared_inputs
from adamix.compression.error import relative_error
from adamix.compression.hessian import hessian, identity
from adamix.compression.matrix import quantize_matrix
from adamix.config import Config
from adamix.errors import AdamixError, NonFiniteError
from adamix.progress import Progress, timed
from adamix.source.architecture import Architecture
from adamix.source.checkpoints import Checkpoint
from adamix.source.models import load_model, skeleton
from adamix.source.targets import Survey, Target, Treatment, read_pair
from adamix.storage.log import MatrixRow, Spectrum
from adamix.storage.pack import pack
from adamix.storage.work import CompressedMatrix, WorkFolder

TITLE = "calibrating and compressing"
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

        A block's matrices are compressed while the next blocks are calibrated.

        Args:
            tokens: int64 `[sequences, length]`.
            finished: what an earlier run has done.
        """
        done = dict(finished)
        frequency = token_frequency(tokens, self.architecture.vocabulary)
        targets = {target.name: target for target in self.found.of(
            Treatment.LINEAR, Treatment.EMBEDDING) if target.name not in done}
        users = self._users(targets)
        jobs = _Jobs(self.executor, done)

        def submit(gram: Tensor | None, names: list[str]) -> None:
            group = [targets.pop(name) for name in names]
            jobs.submit(self._compress_group, gram, group, frequency)

        self.progress.stage(TITLE, len(targets))
        for name in targets.keys() - {name for names in users.values() for name in names}:
            submit(None, [name])  # an embedding, whose inputs are one-hot
        grams = self._grams(tokens, set(users)) if users else iter(())
        with timed(self.seconds, "calibration and compression"):
            for modules, gram in grams:
                submit(gram, [name for module in modules for name in users[module]])
                del gram
                jobs.wait(MAX_GRAM_BYTES // 2)
            for name in list(targets):  # of modules that the model never calls
                submit(None, [name])
            jobs.wait(-1)
        return {name: done[name] for name in sorted(done)}

    def _users(self, targets: dict[str, Target]) -> dict[str, list[str]]:
        """{linear layer: the targets that its inputs calibrate}: its weight, and the embedding
        where that is the head's weight too."""
        users = {_module(name): [name] for name, target in targets.items()
                 if target.treatment is Treatment.LINEAR}
        if self.architecture.tied and self.architecture.embedding in targets:
            users[_module(self.architecture.head or "")] = [self.architecture.embedding]
        return users

    def _grams(self, tokens: Tensor, wanted: set[str]) -> Iterator[tuple[list[str], Tensor]]:
        """Modules that share an input, with their Gram matrix: block by block where the model's
        code allows that, else with the whole model in memory."""
        folder, finetuned = self.sources[1].folder, self.sources[1]
        shapes = {name: shape for name, (shape, _) in finetuned.headers.items()}
        try:
            stream = BlockStream(skeleton(folder), tokens, wanted, shapes, finetuned.read)
        except Unsuited as why:
            self.progress.stage(f"{TITLE}, with the whole model in memory ({why})", len(wanted))
            yield from self._whole_grams(load_model(folder), tokens, wanted)
            return
        groups = stream.groups
        for grams in stream.grams(groups, executor=self.executor, threads=self.threads,
                                  max_bytes=MAX_GRAM_BYTES // 2):
            while grams:
                leader, gram = grams.popitem()
                yield groups[leader], gram

    def _whole_grams(self, model: nn.Module, tokens: Tensor, wanted: set[str]
                     ) -> Iterator[tuple[list[str], Tensor]]:
        linears = {name: module for name, module in model.named_modules() if name in wanted}
        groups = shared_inputs(model, tokens, linears)
        widths = {leader: linears[leader].in_features for leader in groups}
        for run in passes(widths, MAX_GRAM_BYTES // 2 // (self.threads + 1)):
            grams = accumulate(model, tokens, {leader: linears[leader] for leader in run},
                               executor=self.executor, ahead=self.threads)
            while grams:
                leader, gram = grams.popitem()
                yield groups[leader], gram

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


class _Jobs:
    """Groups of matrices that are being compressed, and the bytes of their Gram matrices."""

    def __init__(self, executor: Executor, done: dict[str, CompressedMatrix]) -> None:
        self._executor, self._done = executor, done
        self._running: dict[Future[dict[str, CompressedMatrix]], int] = {}

    def submit(self, compress: Callable[..., dict[str, CompressedMatrix]], gram: Tensor | None,
               group: list[Target], frequency: Tensor) -> None:
        future = self._executor.submit(compress, gram, group, frequency)
        self._running[future] = 0 if gram is None else gram.nbytes

    def wait(self, max_bytes: int) -> None:
        """Until no more than so many bytes wait; -1: until nothing does. Raises their errors."""
        while self._running:
            ended = [future for future in self._running if future.done()]
            for future in ended:
                del self._running[future]
                self._done.update(future.result())
            if sum(self._running.values()) <= max_bytes:
                return
            if not ended:
                wait(self._running, return_when=FIRST_COMPLETED)


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
