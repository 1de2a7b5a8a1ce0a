"""compress: two checkpoints -> a delta folder. The stages in the order in which data passes."""

from __future__ import annotations

import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from adamix.artifacts import Hessian, Manifest, ModelDelta, PackedDelta, WeightPair
from adamix.budget import COUNTS_BYTES, plan_budget
from adamix.calibration.gram import MAX_GRAM_BYTES, accumulate, passes, shared_inputs
from adamix.calibration.sampling import sample
from adamix.calibration.texts import token_hash, tokenize
from adamix.compression.error import relative_error
from adamix.compression.hessian import hessian, identity
from adamix.compression.matrix import quantize_matrix
from adamix.config import Config
from adamix.errors import AdamixError, CalibrationError, NonFiniteError
from adamix.naming import group_by_kind, write_indices
from adamix.parallel import available_cores, workers
from adamix.progress import Progress, Silent, timed
from adamix.source.architecture import Architecture, describe
from adamix.source.checkpoints import COPIED, Checkpoint
from adamix.source.models import find_tokenizer, load_model
from adamix.source.targets import Survey, Target, Treatment, check_pair, read_pair, survey
from adamix.storage.file import delta_bytes, new_folder, refuse_existing, write_delta
from adamix.storage.log import MatrixRow, Spectrum, write_log, write_spectra, write_tokens
from adamix.storage.pack import pack

FREQUENCY_FLOOR = 0.01  # of the mean token frequency: what the row of an unseen token weighs


@dataclass(frozen=True)
class CompressedMatrix:
    """What one matrix gives: the delta, its log row, and what its plan was chosen from."""

    packed: PackedDelta
    row: MatrixRow
    spectrum: Spectrum


@dataclass(frozen=True)
class Summary:
    """What `compress` did."""

    out: Path
    rows: list[MatrixRow]
    bytes: int  # delta.safetensors + delta_config.json
    bytes_16bit: int  # of all tensors that differ
    whole: dict[str, int]  # bytes of tensors kept whole, norms and biases left out
    bytes_beside: int  # logs, calibration tokens, copies of tokenizer and configs
    seconds: dict[str, float]  # by stage
    peak_bytes: int  # of this process's memory

    @property
    def ratio(self) -> float:
        """16-bit bytes of what differs over bytes on disk."""
        return self.bytes_16bit / self.bytes

    @property
    def relative_error(self) -> float:
        """Mean over the matrices, of the output on the calibration inputs."""
        return sum(row.relative_error for row in self.rows) / max(len(self.rows), 1)


def compress_matrix(delta: Tensor, gram: Tensor, config: Config | None = None) -> PackedDelta:
    """Compress one matrix within `config.bits` a weight, everything counted.

    Args:
        delta: ΔW `[out, in]`, any float dtype.
        gram: X Xᵀ `[in, in]` of the layer's inputs, in any unit.
        config: default `Config(ratio=16)`.

    Raises:
        NonFiniteError: NaN or Inf in either.
        BudgetError: the budget does not pay for one component.
        ValueError: the shapes do not fit each other.
    """
    config = config or Config()
    if delta.dim() != 2 or gram.shape != (delta.shape[1], delta.shape[1]):
        raise ValueError(f"expected a delta [out, in] and a Gram matrix [in, in], got "
                         f"{tuple(delta.shape)} and {tuple(gram.shape)}")
    budget = config.budget_bits(delta.shape) - 8 * COUNTS_BYTES
    result = quantize_matrix(delta, hessian(gram, config.damping), config, budget_bits=budget)
    return pack(result.delta)


def compress(base: str | Path, finetuned: str | Path, out: str | Path,
             config: Config | None = None, *, calibration: str | Path | Sequence[str] | None = None,
             threads: int | None = None, progress: Progress | None = None) -> Summary:
    """Compress the difference between two checkpoints into the folder `out`.

    Args:
        base, finetuned: folders (or Hub names) of Hugging Face checkpoints in safetensors.
        out: the delta folder; must not exist.
        config: default `Config(ratio=16)`.
        calibration: a text file, `.jsonl`, list of strings or dataset name; default: sequences
            sampled from the fine-tuned model itself.
        threads: matrices compressed side by side; the result does not depend on it.
        progress: told about the stages.

    Raises:
        AdamixError: a subclass names the fault in one sentence; nothing is left behind.
    """
    config, progress, out = config or Config(), progress or Silent(), Path(out)
    refuse_existing(out)
    seconds: dict[str, float] = {}
    sources = Checkpoint(base), Checkpoint(finetuned)
    architecture = describe(sources[1].folder)
    check_pair(*sources, architecture)
    threads = threads or available_cores()
    with new_folder(out) as folder, workers(threads) as executor:
        tokens = None
        if calibration is not None:  # read before the models: a fault in it shows at once
            tokens = _read_tokens(sources[1], config, calibration, progress)
        with timed(seconds, "read"):
            progress.stage("reading both models", len({*sources[0].names, *sources[1].names}))
            found = survey(*sources, architecture, compress_embeddings=config.embeddings,
                           on_tensor=lambda name: progress.advance())
        manifest = _manifest(sources, found, config, _origin(calibration, config, tokens))
        budget = plan_budget(found, manifest, config)
        model = load_model(sources[1].folder)
        if tokens is None:
            with timed(seconds, "calibration tokens"):
                tokens = _sample_tokens(model, sources[1], config, executor, progress)
            manifest = replace(manifest, calibration=_origin(calibration, config, tokens))
        run = _Run(sources, found, architecture, config, budget.bits, executor, threads, progress,
                   seconds)
        matrices = run.matrices(model, tokens)
        progress.stage("writing", 1)
        written = _write(folder, sources[1], found, manifest, matrices, tokens)
        beside = sum(p.stat().st_size for p in folder.iterdir()) - written
        progress.advance()
    whole = {t.name: t.numel * t.dtype.itemsize
             for t in found.of(Treatment.WHOLE) if len(t.shape) > 1}
    return Summary(out, [m.row for m in matrices.values()], written, budget.bytes_16bit, whole,
                   beside, seconds, peak_bytes())


@dataclass(frozen=True)
class _Run:
    """The calibration and compression of one model's matrices."""

    sources: tuple[Checkpoint, Checkpoint]
    found: Survey
    architecture: Architecture
    config: Config
    budget_bits: dict[str, int]
    executor: Executor
    threads: int
    progress: Progress
    seconds: dict[str, float]

    def matrices(self, model: nn.Module, tokens: Tensor) -> dict[str, CompressedMatrix]:
        """Every compressed matrix by name, in the survey's order."""
        frequency = token_frequency(tokens, model.get_input_embeddings().weight.shape[0])
        linears = self._linears(model)
        groups = shared_inputs(model, tokens, linears)
        done: dict[str, CompressedMatrix] = {}
        widths = {leader: linears[leader].in_features for leader in groups}
        for run in passes(widths, MAX_GRAM_BYTES // (self.threads + 1)):
            with timed(self.seconds, "calibration"):
                self.progress.stage("calibrating", len(tokens))
                grams = accumulate(model, tokens, {leader: linears[leader] for leader in run},
                                   executor=self.executor, ahead=self.threads,
                                   on_chunk=self.progress.advance)
            jobs = [(grams[leader], self._targets_of(groups[leader])) for leader in run]
            self._compress(jobs, frequency, done)
        # An embedding, whose inputs are one-hot, and modules that the model never calls.
        rest = [target for target in self.found.of(Treatment.LINEAR, Treatment.EMBEDDING)
                if target.name not in done]
        if rest:
            self._compress([(None, [target]) for target in rest], frequency, done)
        return {name: done[name] for name in sorted(done)}

    def _linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The modules whose inputs are needed, by name."""
        wanted = {_module(target.name) for target in self.found.of(Treatment.LINEAR)}
        if self.architecture.tied and self.found.of(Treatment.EMBEDDING):
            wanted.add(_module(self.architecture.head or ""))
        return {name: module for name, module in model.named_modules() if name in wanted}

    def _targets_of(self, modules: list[str]) -> list[Target]:
        names = {f"{module}.weight" for module in modules}
        if self.architecture.tied and self.architecture.head in names:
            names.add(self.architecture.embedding or "")
        return [t for t in self.found.of(Treatment.LINEAR, Treatment.EMBEDDING) if t.name in names]

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
                compressed[target.name] = self._compress_pair(pair, H, gram, weights)
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


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _read_tokens(finetuned: Checkpoint, config: Config,
                 calibration: str | Path | Sequence[str], progress: Progress) -> Tensor:
    """Token ids of a text to calibrate with."""
    tokenizer = find_tokenizer([finetuned.folder])
    if tokenizer is None:
        raise CalibrationError(f"{finetuned.source} has no tokenizer to read text with")
    progress.stage("tokenizing calibration text", 1)
    settings = finetuned.config.get("text_config", finetuned.config)
    limit = settings.get("max_position_embeddings") if isinstance(settings, dict) else None
    tokens = tokenize(calibration, tokenizer, sequences=config.calibration_sequences,
                      length=min(config.calibration_length, limit or config.calibration_length),
                      seed=config.seed)
    progress.advance()
    return tokens


def _sample_tokens(model: transformers.PreTrainedModel, finetuned: Checkpoint, config: Config,
                   executor: Executor, progress: Progress) -> Tensor:
    """Token ids that the fine-tuned model writes itself."""
    tokenizer = find_tokenizer([finetuned.folder])
    settings = model.config.get_text_config()
    limit = getattr(settings, "max_position_embeddings", None)
    end = tokenizer.eos_token_id if tokenizer else settings.eos_token_id
    begins = (tokenizer.bos_token_id if tokenizer else None, settings.bos_token_id, end)
    start = next((token for token in begins if token is not None), None)
    if not isinstance(start, int):
        raise CalibrationError("the model names no token that begins a text: "
                               "give --calibration FILE")
    progress.stage("sampling calibration text", config.calibration_sequences)
    return sample(model, start, end if isinstance(end, int) else None,
                  sequences=config.calibration_sequences,
                  length=min(config.calibration_length, limit or config.calibration_length),
                  seed=config.seed, executor=executor, on_chunk=progress.advance)


def _origin(calibration: str | Path | Sequence[str] | None, config: Config,
            tokens: Tensor | None = None) -> dict[str, object]:
    """Where the calibration comes from; without tokens in the most characters that it can take."""
    label = str(calibration) if isinstance(calibration, (str, Path)) else "strings"
    shape = (config.calibration_sequences, config.calibration_length)
    rows, length = shape if tokens is None else tokens.shape
    return {"source": "self" if calibration is None else label, "sequences": rows, "length": length,
            "sha256": "0" * 64 if tokens is None else token_hash(tokens)}


def _manifest(sources: tuple[Checkpoint, Checkpoint], found: Survey, config: Config,
              calibration: dict[str, object]) -> Manifest:
    matrices = {t.name: t for t in found.of(Treatment.LINEAR, Treatment.EMBEDDING)}
    groups = group_by_kind({name: target.shape for name, target in matrices.items()})

    def indices(*treatments: Treatment) -> dict[str, str]:
        traits = {t.name: (t.shape, t.dtype) for t in found.of(*treatments)}
        return {kind: write_indices(kind, names) for kind, names in group_by_kind(traits).items()}

    dtypes = [t.dtype for t in found.targets if t.dtype.is_floating_point]
    main = max(set(dtypes), key=dtypes.count, default=torch.float32)
    return Manifest(
        base=sources[0].source, finetuned=sources[1].source, dtype=str(main).removeprefix("torch."),
        fingerprint=found.fingerprint, config=config.to_dict(), calibration=calibration,
        compressed={kind: (*matrices[names[0]].shape, write_indices(kind, names))
                    for kind, names in groups.items()},
        whole=indices(Treatment.WHOLE),
        extra_rows=[t.name for t in found.targets if t.extra_rows],
        tied=[t.name for t in found.of(Treatment.TIED)], equal=indices(Treatment.EQUAL),
        absent=found.absent)


def _write(folder: Path, finetuned: Checkpoint, found: Survey, manifest: Manifest,
           matrices: dict[str, CompressedMatrix], tokens: Tensor) -> int:
    """Write the whole folder; the bytes of what loading needs."""
    whole = {t.name: finetuned.read(t.name) for t in found.of(Treatment.WHOLE)}
    extra = {t.name: finetuned.read(t.name)[t.shape[0] :].clone()
             for t in found.targets if t.extra_rows}
    packed = {name: matrix.packed for name, matrix in matrices.items()}
    write_delta(ModelDelta(packed, whole, extra, manifest), folder)
    write_log(folder, [matrix.row for matrix in matrices.values()])
    write_spectra(folder, {name: matrix.spectrum for name, matrix in matrices.items()})
    write_tokens(folder, tokens)
    for name in COPIED:
        if (finetuned.folder / name).exists():
            shutil.copyfile(finetuned.folder / name, folder / name)
    return delta_bytes(folder)


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
