"""What a compression has finished, kept beside the output until the output is whole.

    .OUT.partial/
      lock                     held (flock) by the process at work; the kernel lets go of it when
                               that process dies, however it dies
      fingerprint.json         what the work belongs to: models, config, calibration, versions
      calibration.safetensors  token ids that were sampled, with their hash
      energies/N.safetensors   of a matrix N, where one budget is shared out among all
      matrices/N.safetensors   a finished matrix N: packed delta, spectrum, and its row of the log
      compression_log.csv      a row a finished matrix, in the order in which they were finished
      scratch/                 hidden states that do not fit the memory; of no use to another run
      delta/                   the output while it is written; renamed to OUT

Every file but the log is written under a temporary name, brought to the disk and renamed: one that
is there is whole. The log is for the eye, and written anew when a run goes on. What is finished
depends on the fingerprint alone, so a run that goes on from here ends with the bytes of one that
was never interrupted.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamix.artifacts import PackedDelta
from adamix.errors import (
    BudgetError,
    CalibrationError,
    MismatchError,
    NonFiniteError,
    OutputError,
    ResumeError,
)
from adamix.storage.file import is_disk_full, made_parents, refuse_existing
from adamix.storage.log import LOG_FILE, TOKENS_FILE, MatrixRow, Spectrum, append_log, write_log
from adamix.storage.tensors import save_tensors

LOCK_FILE = "lock"
FINGERPRINT_FILE = "fingerprint.json"
ENERGIES = "energies"
MATRICES = "matrices"
RESULT = "delta"
SCRATCH = "scratch"
TEMPORARY = ".new"
OURS = {LOCK_FILE, FINGERPRINT_FILE, TOKENS_FILE, LOG_FILE, ENERGIES, MATRICES, RESULT, SCRATCH}
NAMED = 3  # differences that a refusal names at most
# Faults of the input itself: the same command would meet them again, and another input has another
# fingerprint, so what was finished before them is of no use.
HOPELESS = (BudgetError, CalibrationError, MismatchError, NonFiniteError)


@dataclass(frozen=True)
class CompressedMatrix:
    """What one matrix gives: the delta, its log row, and what its plan was chosen from."""

    packed: PackedDelta
    row: MatrixRow
    spectrum: Spectrum


def work_path(out: Path) -> Path:
    """Where the work on the output `out` is kept."""
    return out.parent / f".{out.name}.partial"


def count_finished(out: Path) -> int:
    """How many matrices of `out` are finished."""
    return len(list((work_path(out) / MATRICES).glob("*.safetensors")))


class WorkFolder:
    """The work folder of one output, held by this process. Made by `work_folder`."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, work_path(out)
        self.is_ours = not (self.path / FINGERPRINT_FILE).exists()  # else once it was checked
        self._log = threading.Lock()

    def check(self, fingerprint: dict[str, object], *, restart: bool) -> None:
        """Take up the work that is here if it is that of the same run, or begin.

        Args:
            fingerprint: JSON values, nested once at most.
            restart: throw away what is here.

        Raises:
            ResumeError: it belongs to a run of other models or options; the sentence names them.
        """
        file = self.path / FINGERPRINT_FILE
        if restart:
            self._clear()
        found = _read_json(file)
        if found is not None:
            differences = list(_differences(found, json.loads(json.dumps(fingerprint))))
            if differences:
                raise ResumeError(
                    f"{self.path} holds the unfinished work of another run: "
                    f"{'; '.join(differences[:NAMED])}: repeat that run's command to go on with "
                    f"it, or give --restart (restart=True) to throw it away and start over")
        else:
            self._clear()
            _atomically(file, lambda path: path.write_text(json.dumps(fingerprint, indent=1)))
        self.is_ours = True

    def _clear(self) -> None:
        for name in (FINGERPRINT_FILE, TOKENS_FILE, LOG_FILE):
            (self.path / name).unlink(missing_ok=True)
        for name in (ENERGIES, MATRICES, RESULT, SCRATCH):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def tokens(self) -> tuple[Tensor, str] | None:
        """The token ids `[sequences, length]` int64 and their hash, as `keep_tokens` got them."""
        try:
            with safe_open(self.path / TOKENS_FILE, framework="pt") as reader:
                return reader.get_tensor("input_ids").long(), (reader.metadata() or {})["sha256"]
        except (OSError, SafetensorError, KeyError):
            return None

    def keep_tokens(self, tokens: Tensor, sha256: str) -> None:
        """Keep sampled token ids."""
        _atomically(self.path / TOKENS_FILE, lambda path: save_tensors(
            {"input_ids": tokens.to(torch.int32)}, path, {"sha256": sha256}))

    def matrices(self, names: Iterable[str]) -> dict[str, CompressedMatrix]:
        """Those of `names` that are finished; the log is written anew with their rows."""
        finished = {}
        for name in names:
            matrix = _read_matrix(self._file_of(MATRICES, name))
            if matrix is not None:
                finished[name] = matrix
        write_log(self.path, [matrix.row for matrix in finished.values()])
        return finished

    def keep(self, matrix: CompressedMatrix) -> None:
        """A matrix is finished. May be called from several threads."""
        file = self._file_of(MATRICES, matrix.row.name)
        file.parent.mkdir(exist_ok=True)
        _atomically(file, lambda path: _write_matrix(matrix, path))
        with self._log:
            append_log(self.path, matrix.row)

    def energies(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What `keep_energies` got of those of `names` for which it did."""
        found = {}
        for name in names:
            try:
                with safe_open(self._file_of(ENERGIES, name), framework="pt") as reader:
                    found[name] = reader.get_tensor(ENERGIES).clone()
            except (OSError, SafetensorError):
                pass
        return found

    def keep_energies(self, name: str, energies: Tensor) -> None:
        """The output energies of a matrix's components are known. From any thread."""
        file = self._file_of(ENERGIES, name)
        file.parent.mkdir(exist_ok=True)
        _atomically(file, lambda path: save_tensors({ENERGIES: energies}, path))

    def _file_of(self, kind: str, name: str) -> Path:
        return self.path / kind / f"{quote(name, safe='')}.safetensors"

    @property
    def is_worth_keeping(self) -> bool:
        """Whether anything is finished."""
        return ((self.path / TOKENS_FILE).exists() or (self.path / ENERGIES).exists()
                or count_finished(self.out) > 0)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what only this run needs, gone after the block."""
        folder = self.path / SCRATCH
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def result(self) -> Iterator[Path]:
        """A folder that becomes the output if the block ends well."""
        folder = self.path / RESULT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        folder.chmod(0o755)
        refuse_existing(self.out)
        folder.rename(self.out)


class NoFolder:
    """Stands for the work folder in a process whose results another one keeps."""

    def check(self, fingerprint: dict[str, object], *, restart: bool) -> None:
        pass

    def tokens(self) -> None:
        return None

    def keep_tokens(self, tokens: Tensor, sha256: str) -> None:
        pass

    def matrices(self, names: Iterable[str]) -> dict[str, CompressedMatrix]:
        return {}

    def keep(self, matrix: CompressedMatrix) -> None:
        pass

    def energies(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {}

    def keep_energies(self, name: str, energies: Tensor) -> None:
        pass

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what only this run needs, among the machine's temporary files."""
        with tempfile.TemporaryDirectory(prefix="adamix-") as folder:
            yield Path(folder)


@contextmanager
def work_folder(out: Path) -> Iterator[WorkFolder]:
    """The work folder of `out`, new or as an earlier run left it, for the block.

    After the block it is gone where `out` has appeared, where nothing is finished, and where the
    input itself is at fault; else it stays for the next run.

    Raises:
        OutputError: `out` exists or cannot be made, or the disk is full.
        ResumeError: another process is at work on the same output, or the folder is not one of
            ours.
    """
    refuse_existing(out)
    with made_parents(out):
        lock = _lock(work_path(out))
        work = WorkFolder(out)
        keep = False
        try:
            yield work
        except BaseException as error:
            keep = work.is_worth_keeping and not isinstance(error, HOPELESS)
            if is_disk_full(error):
                left = f"what is finished is kept in {work.path}" if keep else "nothing was written"
                raise OutputError(f"the disk of {out.parent} is full: {left}") from error
            raise
        finally:
            if work.is_ours and not keep:
                shutil.rmtree(work.path, ignore_errors=True)
            lock.close()


def _lock(folder: Path) -> TextIO:
    """The folder's lock file, locked; the folder is made where it is missing."""
    file = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(exist_ok=True)
            if any(path.name.removesuffix(TEMPORARY) not in OURS for path in folder.iterdir()):
                raise ResumeError(f"{folder} exists and is no work folder of adamix: remove it")
            lock = file.open("a")
        except FileNotFoundError:
            continue  # another run ended and took the folder with it
        except OSError as error:
            raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                return lock
        except FileNotFoundError:
            pass
        except OSError as error:
            lock.close()
            raise ResumeError(f"another process is at work on {folder}: wait for it, or choose "
                              f"another output folder") from error
        lock.close()


def _atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Write `file` so that it is there whole or not at all, after a loss of power too."""
    temporary = file.with_name(file.name + TEMPORARY)
    write(temporary)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(file)


def _write_matrix(matrix: CompressedMatrix, path: Path) -> None:
    packed, spectrum = matrix.packed, matrix.spectrum
    tensors = {"words": packed.words, "scales": packed.scales,
               "singular_values": spectrum.singular_values, "errors": spectrum.errors}
    facts = {"row": asdict(matrix.row), "v_counts": packed.v_counts, "u_counts": packed.u_counts,
             "shape": packed.shape, "widths": spectrum.widths}
    save_tensors(tensors, path, {"facts": json.dumps(facts)})


def _read_matrix(path: Path) -> CompressedMatrix | None:
    """A finished matrix; None where there is none, or none that can be read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as reader:
            facts = json.loads((reader.metadata() or {})["facts"])
            words, scales, values, errors = (reader.get_tensor(name).clone() for name in (
                "words", "scales", "singular_values", "errors"))
        packed = PackedDelta(words, scales, tuple(facts["v_counts"]), tuple(facts["u_counts"]),
                             tuple(facts["shape"]))
        return CompressedMatrix(packed, MatrixRow(**facts["row"]),
                                Spectrum(values, errors, tuple(facts["widths"])))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _read_json(file: Path) -> dict[str, object] | None:
    try:
        body = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def _differences(then: dict[str, object], now: dict[str, object], prefix: str = ""
                 ) -> Iterator[str]:
    """Sentences on the values that are not the same."""
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{key} ")
        elif old != new:
            yield f"{prefix}{key} was {_brief(old)} and is {_brief(new)} now"


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}…"
