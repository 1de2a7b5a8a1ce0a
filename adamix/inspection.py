"""inspect: where the bytes of a delta folder go, and what they cost in exactness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from adamix.artifacts import ModelDelta, PackedDelta
from adamix.config import MODEL_BITS
from adamix.errors import DeltaFileError
from adamix.naming import kind_of, read_indices
from adamix.storage.file import delta_bytes, read_delta
from adamix.storage.log import LOG_FILE, read_log


@dataclass(frozen=True)
class KindRow:
    """The compressed matrices of one kind."""

    kind: str  # "model.layers.*.mlp.up_proj.weight"
    tensors: int
    shape: tuple[int, int]  # of the first
    v_widths: dict[int, int]  # {bits: rows of V}, over the kind
    u_widths: dict[int, int]  # {bits: columns of U}
    mean_rank: float
    bytes: int
    bits_per_weight: float
    mean_error: float | None  # of the output on the calibration inputs; None without a log
    worst_error: float | None


@dataclass(frozen=True)
class Inspection:
    """A delta folder in figures. `bytes` = matrices + whole + extra rows + overhead."""

    path: Path
    base: str
    finetuned: str
    dtype: str
    config: dict[str, object]
    calibration: dict[str, object]
    kinds: list[KindRow]
    whole: list[str]
    equal: list[str]
    tied: list[str]
    absent: list[str]
    extra_rows: dict[str, int]
    bytes: int  # on disk, all that loading needs
    bytes_matrices: int
    bytes_whole: int
    bytes_extra_rows: int
    bytes_overhead: int  # headers and delta_config.json
    bytes_beside: int  # logs and copies, not needed to load
    bytes_16bit: int  # of all tensors that differ
    weights: int  # of the compressed matrices
    mean_error: float | None
    worst_error: float | None
    worst_matrix: str | None

    @property
    def bits_per_weight(self) -> float:
        """Of the compressed matrices."""
        return 8 * self.bytes_matrices / max(self.weights, 1)

    @property
    def ratio(self) -> float:
        """`bytes_16bit` over bytes on disk."""
        return self.bytes_16bit / self.bytes

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        return asdict(self) | {"path": str(self.path), "bits_per_weight": self.bits_per_weight,
                               "ratio": self.ratio}


def inspect(path: str | Path) -> Inspection:
    """Read a delta folder and add up what is in it.

    Raises:
        DeltaFileError: it cannot be read. A missing log only leaves the errors out.
    """
    folder = Path(path)
    delta = read_delta(folder)
    errors = _errors(folder)
    by_kind: dict[str, list[str]] = {}
    for name in delta.matrices:
        by_kind.setdefault(kind_of(name), []).append(name)
    total = delta_bytes(folder)
    matrices = sum(packed.nbytes for packed in delta.matrices.values())
    whole = sum(tensor.nbytes for tensor in delta.whole.values())
    extra = sum(tensor.nbytes for tensor in delta.extra_rows.values())
    worst = max((name for name in errors if name in delta.matrices), key=errors.__getitem__,
                default=None)
    manifest = delta.manifest
    weights = sum(_weights(packed) for packed in delta.matrices.values())
    kept = sum(t.numel() for t in (*delta.whole.values(), *delta.extra_rows.values()))
    return Inspection(
        folder, manifest.base, manifest.finetuned, manifest.dtype, manifest.config,
        manifest.calibration, [_row(kind, names, delta, errors) for kind, names in by_kind.items()],
        whole=sorted(delta.whole), equal=_names(manifest.equal), tied=manifest.tied,
        absent=manifest.absent,
        extra_rows={name: tensor.shape[0] for name, tensor in delta.extra_rows.items()},
        bytes=total, bytes_matrices=matrices, bytes_whole=whole, bytes_extra_rows=extra,
        bytes_overhead=total - matrices - whole - extra,
        bytes_beside=sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) - total,
        bytes_16bit=MODEL_BITS // 8 * (weights + kept), weights=weights,
        mean_error=_mean([errors[name] for name in delta.matrices if name in errors]),
        worst_error=errors[worst] if worst else None, worst_matrix=worst)


def _row(kind: str, names: list[str], delta: ModelDelta, errors: dict[str, float]) -> KindRow:
    packed = [delta.matrices[name] for name in names]
    found = [errors[name] for name in names if name in errors]
    size = sum(p.nbytes for p in packed)
    return KindRow(kind, len(names), packed[0].shape, _add_up(p.v_widths for p in packed),
                   _add_up(p.u_widths for p in packed), sum(p.rank for p in packed) / len(packed),
                   size, 8 * size / sum(map(_weights, packed)), _mean(found),
                   max(found, default=None))


def _add_up(matrices: Iterable[dict[int, int]]) -> dict[int, int]:
    """{bits: lanes} over several matrices, widest first."""
    counts: Counter[int] = Counter()
    for widths in matrices:
        counts.update(widths)
    return dict(sorted(counts.items(), reverse=True))


def _errors(folder: Path) -> dict[str, float]:
    """{matrix: relative error} of the log; empty without one."""
    if not (folder / LOG_FILE).exists():
        return {}
    try:
        return {row.name: row.relative_error for row in read_log(folder)}
    except DeltaFileError:
        return {}


def _names(kinds: dict[str, str]) -> list[str]:
    return [name for kind, indices in kinds.items() for name in read_indices(kind, indices)]


def _weights(packed: PackedDelta) -> int:
    return packed.shape[0] * packed.shape[1]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
