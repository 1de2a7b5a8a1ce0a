"""The matrices of a model, one after the other: calibrated, compressed, and kept as finished."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from adamix.artifacts import Hessian
from adamix.calibration.blocks import BlockStream, Unsuited
from adamix.calibration.gram import accumulate, passes, shared_inputs
from adamix.calibration.layers import ExpertGrams, find_layers, in_features
from adamix.compression.allocate import allocate
from adamix.compression.error import output_error, relative_error
from adamix.compression.hessian import hessian, identity
from adamix.compression.matrix import quantize_matrix
from adamix.compression.pairs import sets_of_pairs, union
from adamix.compression.share import SPREAD, energies, share_out
from adamix.config import Config
from adamix.costs import group_cost
from adamix.devices import CPU, Compute, held_bytes, matrix_device_bytes, plan_device
from adamix.errors import AdamixError, NonFiniteError
from adamix.jobs import Jobs
from adamix.memory import MemoryPlan, matrix_bytes, plan_memory, resident_bytes, sizes
from adamix.naming import index_of
from adamix.progress import Progress, timed
from adamix.ranks import Loads, Ranks
from adamix.source.architecture import Architecture
from adamix.source.checkpoints import Checkpoint
from adamix.source.models import load_model, skeleton
from adamix.source.parts import ModelTensors
from adamix.source.targets import Survey, Target, Treatment, read_pair
from adamix.storage.log import IDENTITY, LAYER, OWN, MatrixRow, Spectrum
from adamix.storage.pack import pack
from adamix.storage.work import CompressedMatrix, NoFolder, WorkFolder

TITLE = "calibrating and compressing"
MEASURING = "measuring where the budget is best spent"
Result = CompressedMatrix | Tensor
Work = Callable[[str, Tensor, Hessian, str, Tensor | None], Result]
Tell = Callable[[dict[str, Result]], None]  # another rank of what this one has done
FREQUENCY_FLOOR = 0.01  # of the mean token frequency: what the row of an unseen token weighs


@dataclass(frozen=True)
class MatrixRun:
    """The calibration and compression of one model's matrices."""

    sources: tuple[Checkpoint, Checkpoint]
    found: Survey
    architecture: Architecture
    config: Config
    budget_bits: dict[str, int]
    work: WorkFolder | NoFolder
    executor: Executor
    threads: int
    max_memory: int | None
    progress: Progress
    seconds: dict[str, float]
    calibrator: Executor  # of the forward passes
    compute: Compute = CPU
    solve: Callable[..., Tensor] = allocate
    ranks: Ranks = field(default_factory=Ranks)
    headroom: int = 1  # times its budget that a matrix may take yet

    def matrices(self, tokens: Tensor, finished: dict[str, CompressedMatrix]
                 ) -> dict[str, CompressedMatrix]:
        """Every compressed matrix by name, sorted; of several ranks rank 0 has those of all.

        A block's matrices are compressed while the next blocks are calibrated.

        Args:
            tokens: int64 `[sequences, length]`.
            finished: what an earlier run has done, for rank 0.
        """
        run = self._shared_out(tokens) if self.config.allocate == "model" else self
        done = dict(finished)
        with timed(self.seconds, "calibration and compression"):
            run._each(tokens, TITLE, run._compress, done)
        return {name: done[name] for name in sorted(done)}

    def _shared_out(self, tokens: Tensor) -> MatrixRun:
        """The same run, with one budget for all matrices spent where it lowers the error most."""
        spectra = self.work.energies(self.budget_bits)
        with timed(self.seconds, "sharing the budget out"):
            # A bound on memory that is too little for what a matrix may get is refused here.
            roomy = replace(self, headroom=SPREAD)
            roomy._each(tokens, MEASURING, self._measure, spectra)
            shapes = {target.name: target.shape for target in self._targets}
            shares = self.ranks.main(lambda: share_out(
                {name: spectra[name] for name in sorted(spectra)}, shapes, self.budget_bits,
                union(sets_of_pairs(self.config))))
        return replace(self, budget_bits=shares)

    def _each(self, tokens: Tensor, title: str, one: Work, done: dict[str, Result]) -> None:
        """one(name, ΔW, H, whose tokens those are, row weights) of every target that is not in rank
        0's `done` yet, which gets it."""
        def arrived(found: dict[str, Result]) -> None:
            for name, result in found.items():
                self._keep(name, result)
                done[name] = result
                self.progress.advance()

        finished = self.ranks.main(lambda: set(done))
        with self.ranks.results(arrived) as tell:
            self._begin(tokens, title, one, done, finished, tell)

    def _begin(self, tokens: Tensor, title: str, one: Work, done: dict[str, Result],
               finished: Collection[str], tell: Tell) -> None:
        """This rank's part of `_each`."""
        frequency = token_frequency(tokens, self.architecture.vocabulary).to(self.compute.device)
        targets = {target.name: target for target in self._targets if target.name not in finished}
        users = self._users(targets)
        plan = self._plan(tokens, users, targets.values(), whole=False)
        jobs = Jobs(self.executor, done, plan, self.ranks.check)
        loads, begun = Loads(self.ranks.count), set[str]()

        def submit(gram: Tensor | None, names: list[str], origin: str = IDENTITY) -> None:
            group = [targets[name] for name in names]
            begun.update(names)
            waiting = [] if gram is None else [gram]  # for the job to let go of
            jobs.submit(max(map(self._job_bytes, group)), 0 if gram is None else gram.nbytes,
                        partial(self._group, one, waiting, group, frequency, origin, tell,
                                self.compute.queued()))

        def submit_ours(names: list[str]) -> None:
            """Those of single matrices without inputs that are this rank's."""
            owners = loads.spread([self._cost([targets[name]]) for name in names])
            for name, owner in zip(names, owners, strict=True):
                if owner == self.ranks.rank:
                    submit(None, [name])

        self.progress.stage(title, len(targets))
        # An embedding, whose inputs are one-hot.
        submit_ours(sorted(targets.keys() - {n for names in users.values() for n in names}))
        for modules, gram, origin in (self._grams(tokens, title, users, plan, jobs, loads)
                                      if users else ()):
            submit(gram, [name for module in modules for name in users[module]], origin)
            del gram
            jobs.make_room()
        anywhere = set[str]().union(*self.ranks.gather(begun))
        submit_ours([name for name in targets if name not in anywhere])  # never called
        jobs.finish()

    def _keep(self, name: str, result: Result) -> None:
        if isinstance(result, CompressedMatrix):
            self.work.keep(result)
        else:
            self.work.keep_energies(name, result)

    def _cost(self, targets: list[Target]) -> float:
        return group_cost([target.shape for target in targets],
                          [self.budget_bits[target.name] for target in targets], self.config)

    def _owners(self, groups: dict[str, list[str]], users: dict[str, list[str]], loads: Loads
                ) -> dict[str, int]:
        """{the first layer of those that share an input: the rank that compresses them}, balanced
        over each block and those before it."""
        targets = {target.name: target for target in self._targets}
        owners: dict[str, int] = {}
        for _, block in groupby(groups, lambda leader: index_of(leader)[:1]):
            leaders = list(block)
            costs = [self._cost([targets[name] for module in groups[leader]
                                 for name in users[module]]) for leader in leaders]
            owners |= dict(zip(leaders, loads.spread(costs), strict=True))
        return owners

    @property
    def _targets(self) -> list[Target]:
        return self.found.of(Treatment.LINEAR, Treatment.EMBEDDING)

    def _users(self, targets: dict[str, Target]) -> dict[str, list[str]]:
        """{linear layer, or expert's matrix: the targets that its inputs calibrate}: its weight,
        or its parts of a checkpoint, and the embedding where that is the head's weight too."""
        users: dict[str, list[str]] = {}
        for name, target in targets.items():
            if target.treatment is Treatment.LINEAR:
                users.setdefault(self.architecture.input_of(name), []).append(name)
        if self.architecture.tied and self.architecture.embedding in targets:
            head = self.architecture.input_of(self.architecture.head or "")
            users[head] = [self.architecture.embedding]
        return users

    def _job_bytes(self, target: Target) -> int:
        bits = self.headroom * self.budget_bits[target.name]
        if not self.compute.is_cuda:
            return matrix_bytes(target.shape, bits, self.config)
        return matrix_device_bytes(target.shape, target.dtype.itemsize, bits, self.config,
                                   weighted=target.treatment is Treatment.EMBEDDING)

    def _plan(self, tokens: Tensor, users: dict[str, list[str]], targets: Collection[Target], *,
              whole: bool) -> MemoryPlan:
        """How to keep to `max_memory`, or to the GPU's, from here on.

        All ranks go through the same passes: as many as the one with the least room needs.
        """
        plan = self._own_plan(tokens, users, targets, whole=whole)
        grams, threads = zip(*self.ranks.gather((plan.grams, plan.threads)), strict=True)
        return replace(plan, grams=min(grams), threads=min(threads))

    def _own_plan(self, tokens: Tensor, users: dict[str, list[str]], targets: Collection[Target], *,
                  whole: bool) -> MemoryPlan:
        if self.max_memory is None and not self.compute.is_cuda:
            return MemoryPlan.unbounded(self.threads)
        shapes = {name: shape for name, (shape, _) in self.sources[1].headers.items()}
        asked = {target.name: target.shape for target in self.found.targets}
        found = sizes(shapes, [asked[name] for names in users.values() for name in names],
                      self.architecture.hidden, tuple(tokens.shape), whole=whole,
                      experts=self.architecture.experts)
        largest = max(map(self._job_bytes, targets), default=0)
        sums = self.ranks.share({}).at_once
        if self.compute.is_cuda:
            plan = plan_device(self.compute, found, self._block_grams(users, asked), largest, sums,
                               whole=whole)
            self.compute.bound(held_bytes(self.compute, found) + plan.free)
            return plan
        results = sum(self.budget_bits.values()) // 8
        exact = sum(target.numel * target.dtype.itemsize for target in
                    self.found.of(Treatment.WHOLE))
        # A matrix is held with its spectrum; written, all are held twice more.
        return plan_memory(self.max_memory, resident_bytes() + 2 * results, found,
                           largest, 2 * results + 3 * exact, self.threads, sums)

    def _block_grams(self, users: dict[str, list[str]], shapes: dict[str, tuple[int, ...]]) -> int:
        """Bytes of the Gram matrices of the block that has most, were none of them shared."""
        grams: dict[int, int] = {}
        for names in users.values():
            block = next(iter(index_of(names[0])), -1)
            grams[block] = grams.get(block, 0) + 4 * shapes[names[0]][1] ** 2
        return max(grams.values(), default=0)

    def _grams(self, tokens: Tensor, title: str, users: dict[str, list[str]], plan: MemoryPlan,
               jobs: Jobs, loads: Loads) -> Iterator[tuple[list[str], Tensor, str]]:
        """Layers that share an input, with their Gram matrix and its origin: block by block where
        the model's code allows that, else with the whole model in memory. Of several ranks each
        gets those that it is to compress."""
        finetuned = self.sources[1]
        tensors = ModelTensors(finetuned, self.architecture.parts)
        owners: dict[str, int] = {}
        share = self.ranks.share(owners)
        jobs.make_room()
        with self.work.scratch() as states:
            stream, why = None, ""
            try:
                stream = BlockStream(skeleton(finetuned.folder), tokens, users.keys(),
                                     tensors.shapes, tensors.read,
                                     states if plan.states_on_disk else None,
                                     self.compute.device, self.compute.dtype, share)
            except Unsuited as error:
                why = str(error)
            why = next(filter(None, self.ranks.gather(why)), "")
            if stream is not None and not why:
                groups = stream.groups
                owners |= self._owners(groups, users, loads)
                yield from _by_group(groups, stream.few_tokens, stream.grams(
                    groups, executor=self.calibrator, threads=plan.threads, max_bytes=plan.grams))
                return
        self.progress.stage(f"{title}, with the whole model in memory ({why})",
                            sum(map(len, users.values())))
        jobs.finish()
        jobs.plan = plan = self._plan(tokens, users, self._targets, whole=True)
        model = load_model(finetuned.folder, self.compute.dtype).to(self.compute.device)
        yield from self._whole_grams(model, tokens, users, plan, loads)

    def _whole_grams(self, model: nn.Module, tokens: Tensor, users: dict[str, list[str]],
                     plan: MemoryPlan, loads: Loads) -> Iterator[tuple[list[str], Tensor, str]]:
        layers = find_layers(model, users.keys())
        groups = shared_inputs(model, tokens, layers)
        share = self.ranks.share(self._owners(groups, users, loads))
        widths = {leader: in_features(layers[leader]) for leader in groups}
        experts = ExpertGrams({name: layers[name] for name in groups}, share=share)
        for run in passes(widths, plan.grams // (plan.threads + share.at_once)):
            size, seen = sum(4 * widths[leader] ** 2 for leader in run), {}
            ahead = max(1, min(plan.threads, plan.grams // size - share.at_once))
            grams = accumulate(model, tokens, {leader: layers[leader] for leader in run},
                               executor=self.calibrator, seen=seen, ahead=ahead, share=share)
            yield from _by_group(groups, experts.few, iter([experts.settle(run, grams, seen)]))

    def _group(self, one: Work, grams: list[Tensor], targets: list[Target], frequency: Tensor,
               origin: str, tell: Tell, queued: torch.cuda.Event | None) -> dict[str, Result]:
        """The matrices that read one input, one after the other.

        Args:
            grams: of it, no more than one; emptied.
            queued: what comes first on a GPU.
        """
        self.compute.after(queued, frequency, *grams)
        if not any(gram.any() for gram in grams):  # nothing ever reached it: any input counts alike
            grams.clear()
            origin = IDENTITY
        with _named(targets[0].name):
            H = (hessian(grams.pop(), self.config.damping) if grams
                 else identity(targets[0].shape[1], self.compute.device))
        results = {}
        for target in targets:
            weights = None
            if target.treatment is Treatment.EMBEDDING:
                weights = frequency[: target.shape[0]]
            with _named(target.name):
                results[target.name] = one(target.name, self._delta(target), H, origin, weights)
            self._keep(target.name, results[target.name])
            tell({target.name: results[target.name]})
            self.progress.advance()
        return results

    def _delta(self, target: Target) -> Tensor:
        """ΔW in fp64, and no longer the weights that it is of: of embeddings they are large."""
        return read_pair(*self.sources, target).to(self.compute.device).delta.double()

    def _measure(self, name: str, delta: Tensor, H: Hessian, origin: str, weights: Tensor | None
                 ) -> Tensor:
        found = energies(delta, H, weights)
        if not torch.isfinite(found).all():
            raise NonFiniteError("the energies of its components are not finite")
        return found.cpu()

    def _compress(self, name: str, delta: Tensor, H: Hessian, origin: str, weights: Tensor | None
                  ) -> CompressedMatrix:
        start = time.perf_counter()
        result = quantize_matrix(delta, H, self.config, row_weights=weights,
                                 budget_bits=self.budget_bits[name], solve=self.solve)
        packed = pack(result.delta)
        restored = packed.dequantize()
        error = (relative_error(delta, restored, None, weights) if origin == IDENTITY
                 else output_error(delta, restored, H, weights))
        if not math.isfinite(error):
            raise NonFiniteError(f"its relative error is {error}")
        row = MatrixRow.of(name, packed, error, time.perf_counter() - start, origin)
        spectrum = Spectrum(result.singular_values.cpu(), result.errors.cpu(), result.widths)
        return CompressedMatrix(packed.to("cpu"), row, spectrum)


def _by_group(groups: dict[str, list[str]], few_tokens: Collection[str],
              found: Iterator[dict[str, Tensor]]) -> Iterator[tuple[list[str], Tensor, str]]:
    """One Gram matrix at a time, with no other hold on it."""
    for grams in found:
        while grams:
            leader = next(iter(grams))
            yield groups[leader], grams.pop(leader), LAYER if leader in few_tokens else OWN


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
