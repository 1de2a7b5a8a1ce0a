"""compress: two checkpoints -> a delta folder. The stages in the order in which data passes."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adamix import ops
from adamix.artifacts import Manifest, ModelDelta, PackedDelta
from adamix.budget import COUNTS_BYTES, plan_budget
from adamix.calibration.token_ids import Source
from adamix.compression.allocate import allocate
from adamix.compression.hessian import hessian
from adamix.compression.matrix import quantize_matrix
from adamix.config import Config
from adamix.devices import JOBS, Compute, find_compute
from adamix.errors import RankError
from adamix.matrices import MatrixRun
from adamix.memory import check_survey
from adamix.naming import group_by_kind, write_indices
from adamix.parallel import workers
from adamix.progress import Progress, Silent, timed
from adamix.ranks import Ranks, launched
from adamix.solving import solvers
from adamix.source.architecture import Architecture, describe
from adamix.source.checkpoints import COPIED, Checkpoint
from adamix.source.targets import Survey, Treatment, check_pair, survey
from adamix.storage.file import FORMAT_VERSION, delta_bytes, refuse_existing, write_delta
from adamix.storage.log import MatrixRow, write_log, write_spectra, write_tokens
from adamix.storage.pack import pack
from adamix.storage.work import CompressedMatrix, NoFolder, WorkFolder, work_folder
from adamix.tokens import document_length, origin_of, own_tokens, read_tokens, settled
from adamix.version import __version__


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
    peak_bytes: int  # of this process's memory; of several, of the one that held most
    resumed: int = 0  # matrices that an earlier, interrupted run had finished
    processes: int = 1
    # Mean tokens of a text that the fine-tune wrote to calibrate by; None if it wrote none.
    document_length: float | None = None
    sample_from: str | None = None  # "finetuned", "both" or "base"; None where text was given

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
             config: Config | None = None, *, calibration: Source | None = None,
             threads: int | None = None, device: str | torch.device | None = None,
             max_memory: int | None = None, restart: bool = False,
             progress: Progress | None = None) -> Summary:
    """Compress the difference between two checkpoints into the folder `out`.

    What is finished is kept in `.OUT.partial` beside it until all is: the same call goes on there
    after an interruption of any kind, and ends with the same bytes.

    In a script that torchrun started as several processes, each makes this call with the same
    arguments and they do it together, with the same bytes: on a GPU each, or on its share of the
    cores. `out` and what is beside it are process 0's, checkpoints are read by each; all get the
    same summary, or the same error.

    Args:
        base, finetuned: folders (or Hub names) of Hugging Face checkpoints in safetensors.
        out: the delta folder; must not exist.
        config: default `Config(ratio=16)`.
        calibration: text (a file, `.jsonl`, list of strings or dataset name), or token ids, all of
            which are used (a tensor, `.npy`, `.safetensors`); default: those of
            `config.sample_from` sample them.
        threads: matrices compressed side by side on the CPU, by each process; the result does not
            depend on it.
        device: "cpu", "cuda" or "cuda:N"; default: a GPU where there is one. On it the forward
            passes are of 16 bits if the model's weights are, so the result differs a little.
        max_memory: bytes that a process may hold at most; the result does not depend on it.
        restart: throw away what an interrupted run has left, and begin anew.
        progress: told about the stages.

    Raises:
        AdamixError: a subclass names the fault in one sentence; bad input leaves nothing behind.
    """
    given = _Given(config or Config(), calibration, threads, device, max_memory, restart)
    with launched() as ranks:
        return _compress(base, finetuned, Path(out), given, ranks,
                         progress if progress and ranks.is_main else Silent())


@dataclass(frozen=True)
class _Given:
    """The arguments of `compress` by these names."""

    config: Config
    calibration: Source | None
    threads: int | None
    device: str | torch.device | None
    max_memory: int | None
    restart: bool


def _compress(base: str | Path, finetuned: str | Path, out: Path, given: _Given, ranks: Ranks,
              progress: Progress) -> Summary:
    config, calibration, max_memory = given.config, given.calibration, given.max_memory
    if ranks.is_main:
        refuse_existing(out)
    seconds: dict[str, float] = {}
    sources = Checkpoint(base), Checkpoint(finetuned)
    architecture = describe(sources[1].folder, sources[1].names)
    check_pair(*sources, architecture)
    threads = given.threads or ranks.cores
    compute = find_compute(ranks.device(given.device),
                           [dtype for _, dtype in sources[1].headers.values()])
    ranks.use(compute)
    with (work_folder(out) if ranks.is_main else nullcontext(NoFolder()) as work,
          workers(threads) as executor, _on(compute, executor) as (jobs, calibrator, solve),
          ranks.as_one()):
        tokens = None
        if calibration is not None:  # read before the models: a fault in it shows at once
            tokens = ranks.main(lambda: read_tokens(
                sources[1], architecture.vocabulary, config, calibration, progress))
        with timed(seconds, "read"):
            found = _survey(sources, architecture, config, executor, threads, max_memory, progress,
                            ranks)
        manifest = manifest_of(sources, found, config, origin_of(calibration, config, tokens))
        budget = plan_budget(found, manifest, config)
        fingerprint = _fingerprint(manifest, found, sources, compute, sampled=tokens is None)
        if any(other != fingerprint for other in ranks.gather(fingerprint)):
            raise RankError("the processes were started with different models, options or versions")
        work.check(fingerprint, restart=given.restart)
        finished = work.matrices(budget.bits)
        if tokens is None:
            with timed(seconds, "calibration tokens"):
                tokens = own_tokens(work, sources, config, compute, threads, max_memory, progress,
                                    ranks)
            config = settled(config, tokens)
        manifest = replace(manifest, calibration=origin_of(calibration, config, tokens))
        run = MatrixRun(sources, found, architecture, config, budget.bits, work, jobs, threads,
                        max_memory, progress, seconds, calibrator, compute, solve, ranks)
        matrices = run.matrices(tokens, finished)
        progress.stage("writing", 1)
        sizes = ranks.main(lambda: _write(work, sources[1], found, manifest, matrices, tokens))
        progress.advance()
        rows = ranks.main(lambda: [matrix.row for matrix in matrices.values()])
        return Summary(out, rows, sizes[0], budget.bytes_16bit, _whole_bytes(found), sizes[1],
                       ranks.main(lambda: seconds), max(ranks.gather(peak_bytes())),
                       ranks.main(lambda: len(finished)), ranks.count,
                       document_length(tokens, config) if calibration is None else None,
                       config.sample_from if calibration is None else None)


def _whole_bytes(found: Survey) -> dict[str, int]:
    return {t.name: t.numel * t.dtype.itemsize
            for t in found.of(Treatment.WHOLE) if len(t.shape) > 1}


def _survey(sources: tuple[Checkpoint, Checkpoint], architecture: Architecture, config: Config,
            executor: Executor, threads: int, max_memory: int | None, progress: Progress,
            ranks: Ranks) -> Survey:
    if max_memory is not None:
        check_survey(max_memory, [shape for shape, _ in sources[1].headers.values()])
        threads = 1
    progress.stage("reading both models", len({*sources[0].names, *sources[1].names}))
    return survey(*sources, architecture, compress_embeddings=config.embeddings,
                  compress_vision=config.vision, executor=executor if threads > 2 else None,
                  on_tensor=lambda name: progress.advance(), mine=ranks.mine,
                  gather=ranks.gather)


@contextmanager
def _on(compute: Compute, executor: Executor
        ) -> Iterator[tuple[Executor, Executor, Callable[..., Tensor]]]:
    """What compresses matrices, what runs forward passes, and what solves integer programs."""
    if not compute.is_cuda:
        yield executor, executor, allocate
        return
    with (ThreadPoolExecutor(JOBS, initializer=compute.begin_thread) as jobs,
          ThreadPoolExecutor(1, initializer=partial(torch.cuda.set_device, compute.device))
          as calibrator, solvers(JOBS) as pool, torch.cuda.device(compute.device),
          compute.bounded()):
        try:
            yield jobs, calibrator, pool.allocate
        finally:
            jobs.shutdown(cancel_futures=True)  # after an error nothing queued is begun


def _fingerprint(manifest: Manifest, found: Survey, sources: tuple[Checkpoint, Checkpoint],
                 compute: Compute, *, sampled: bool) -> dict[str, object]:
    """All that the bytes of a finished matrix depend on, by names for a sentence on what differs.

    The hash of sampled text is not in it: the models and the config determine it.
    """
    calibration = dict(manifest.calibration)
    base = {"name": manifest.base, "sha256": manifest.fingerprint["sha256"]}
    if sampled:
        del calibration["sha256"]
        base["configuration"] = sources[0].copied_hash()  # it may write too
    return {"adamix": __version__, "format": FORMAT_VERSION, "layout": ops.LAYOUT_VERSION,
            "torch": torch.__version__, "device": compute.label,
            "base": base,
            "fine-tune": {"name": manifest.finetuned,
                          "sha256": found.finetuned_fingerprint["sha256"],
                          "configuration": sources[1].copied_hash()},
            "config": manifest.config, "calibration": calibration}


def peak_bytes() -> int:
    """The most memory that this process has held."""
    try:  # not getrusage: its figure is at least what the process that began this one held then
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def manifest_of(sources: tuple[Checkpoint, Checkpoint], found: Survey, config: Config,
                calibration: dict[str, object]) -> Manifest:
    """`delta_config.json` of a compression."""
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
        absent=found.absent,
        transposed=[kind for kind, names in groups.items() if matrices[names[0]].transposed])


def _write(work: WorkFolder, finetuned: Checkpoint, found: Survey, manifest: Manifest,
           matrices: dict[str, CompressedMatrix], tokens: Tensor) -> tuple[int, int]:
    """Write the output; the bytes of what loading needs, and of what stands beside it."""
    with work.result() as folder:
        return _write_into(folder, finetuned, found, manifest, matrices, tokens)


def _write_into(folder: Path, finetuned: Checkpoint, found: Survey, manifest: Manifest,
                matrices: dict[str, CompressedMatrix], tokens: Tensor) -> tuple[int, int]:
    whole = {t.name: t.read(finetuned) for t in found.of(Treatment.WHOLE)}
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
    written = delta_bytes(folder)
    return written, sum(path.stat().st_size for path in folder.iterdir()) - written
