"""A row a measurement: what was measured, how long it took, how near it is to the device's roof.

Without torch: plot.py reads rows on any machine.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import shlex
import subprocess
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CEILING = "ceiling"  # the op of rows that say what the device can do
FINETUNES = (1, 2, 4, 8, 12, 16, 32, 64)  # of bench_serving.py, where --finetunes is not given


@dataclass(frozen=True)
class Row:
    """Times are per call, in microseconds: the median over replays, the least and the most.

    None (an empty cell) where a field does not apply, and for every figure of a row that was
    skipped: `note` says why.
    """

    op: str
    shape: str  # in x out, or rows x columns
    models: int | None
    tokens: int | None  # a model
    dtype: str
    bits: str  # a weight (delta_gemm), a code (pack, unpack, gptq)
    impl: str  # "adamix" or a rival's name
    path: str = ""  # which of the implementation's paths was the fastest
    us: float | None = None
    us_min: float | None = None
    us_max: float | None = None
    bytes: float | None = None  # what a call must move, everything once
    flops: float | None = None  # of a call
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    roof_share: float | None = None  # the roof's time over the measured time
    error: float | None = None  # relative, against the CPU operator
    calls: int | None = None  # in the graph
    sets: int | None = None  # of inputs and deltas that the calls go through in turn
    replays: int | None = None
    copy_gb_per_s: float | None = None  # the roof: read and written bytes of a large copy
    roof_tflop_per_s: float | None = None  # and a large matrix product of this kind
    note: str = ""
    device: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return self.op, self.shape, self.models, self.tokens, self.dtype, self.bits, self.impl


@dataclass(frozen=True)
class ServingRow:
    """A whole model with so many fine-tunes, a row of the batch each; times are medians in ms."""

    model: str
    layers: int
    dtype: str
    finetunes: int
    impl: str  # "adamix", or what stands beside it
    path: str = ""  # how steps ran: CUDA graph or eager, compiled or not
    prompt: int | None = None  # tokens a row
    decode_ms: float | None = None  # a token of every row
    decode_ms_min: float | None = None
    decode_ms_max: float | None = None
    tokens_per_s: float | None = None  # of all rows
    prefill_ms: float | None = None  # the prompts of all rows
    model_gb: float | None = None  # of one model's weights
    weights_gb: float | None = None  # on the device: all models, or base and bank
    cache_gb: float | None = None  # keys and values
    peak_gb: float | None = None  # allocated at most, activations included
    load_s: float | None = None  # to read and lay out one fine-tune on the host
    error: float | None = None  # logits of rows in the batch and alone, of the largest
    replays: int | None = None
    note: str = ""
    device: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def slots(self) -> int:
        """Places in the bank of adamix: the most fine-tunes of the run."""
        given = re.search(r"--finetunes((?: +\d+)+)", self.command)
        return max(map(int, given[1].split()) if given else FINETUNES)


@dataclass(frozen=True)
class CompressionRow:
    """A stage of the compression of a pair, or of one decoder layer from its Gram matrices on."""

    model: str
    layers: int
    scope: str  # "model" or "layer"
    impl: str  # "adamix" or "straightforward"
    stage: str  # the row of WHOLE has the figures that are not a stage's
    seconds: float | None = None
    measured_s: float | None = None  # where only a share was done: `seconds` is that, scaled up
    sequences: int | None = None  # that calibrate
    length: int | None = None
    preset: str = ""
    target_ratio: float | None = None  # 16-bit bytes over bytes, as asked for
    processes: int = 1  # that compress together, each on a GPU of its own where `device` is one
    threads: int | None = None  # of each
    host_gb: float | None = None  # the largest process's peak; files that it maps count in it
    device_gb: float | None = None  # allocated at most, on the fullest one
    reserved_gb: float | None = None  # and held by torch
    bytes: int | None = None  # of the delta
    ratio: float | None = None  # as it came out
    error: float | None = None  # of the outputs, relative, in the mean of the matrices
    sha256: str = ""  # of delta.safetensors
    note: str = ""
    device: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""


@dataclass(frozen=True)
class MethodRow:
    """A matrix compressed by one of `methods/`: relative output errors at an exact size."""

    method: str
    matrix: str
    shape: str  # out x in
    budget: float | None  # bits a weight; None for a method of one size
    bits_per_weight: float | None = None  # used, everything counted
    rank: int | None = None
    error_calibration: float | None = None
    error_held_out: float | None = None
    seconds: float | None = None
    threads: int | None = None
    note: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return self.method, self.matrix, self.budget


@dataclass(frozen=True)
class AccuracyRow:
    """What one model scores on a family's held-out prompts; None where a field does not apply."""

    model: str  # the base's name
    family: str
    method: str
    ratio: float | None  # 16-bit bytes of the model over bytes, as asked for
    train_seed: int
    seed: int | None  # of the calibration
    bytes: int | None = None  # of the delta, everything counted; of a LoRA in 16 bits
    error: float | None = None  # of the blocks' outputs on calibration inputs, mean of matrices
    error_held_out: float | None = None  # the same on the held-out prompts' inputs
    prompts: int | None = None
    right: int | None = None
    kl_prompts: float | None = None  # KL(fine-tune ‖ model) a token in nats, prompts and answers
    kl_text: float | None = None  # the same on general text
    seconds: float | None = None  # to compress; of the fine-tune and a LoRA: to train
    note: str = ""
    device: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return self.model, self.family, self.method, self.ratio, self.train_seed, self.seed

    @property
    def accuracy(self) -> float | None:
        """In percent."""
        return None if self.right is None or not self.prompts else 100 * self.right / self.prompts


WHOLE = "whole"  # of a model: from the start of the process to its end, with the file finished


class AnyRow(typing.Protocol):
    """A dataclass of texts and numbers: one of those above, or of paper_rows.py."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field]]


def roof_us(moved: float, flops: float, copy_gb_per_s: float, tflop_per_s: float) -> float:
    """The least time in µs: moving the bytes or doing the arithmetic, whichever takes longer."""
    return max(moved / (copy_gb_per_s * 1e3), flops / (tflop_per_s * 1e6))


def append_row(path: Path, row: AnyRow) -> None:
    """Add a row to a CSV file, under a header if the file is new.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        check_header(path, type(row))
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(_fields(type(row)))
        writer.writerow([_cell(value) for value in dataclasses.astuple(row)])


def check_header(path: Path, kind: type[AnyRow] = Row) -> None:
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != _fields(kind):
        raise ValueError(f"{path} has other columns than this program's rows: write to a new file")


RowKind = typing.TypeVar("RowKind", bound=AnyRow)


def read_rows(paths: Iterable[Path], kind: type[RowKind] = Row) -> list[RowKind]:
    """All rows of CSV files, in order.

    Raises:
        ValueError: a file has other columns.
    """
    rows, types_of = [], typing.get_type_hints(kind)
    for path in paths:
        check_header(path, kind)
        with path.open(newline="") as file:
            rows += [kind(**{name: _value(types_of[name], cell) for name, cell in record.items()})
                     for record in csv.DictReader(file)]
    return rows


def _fields(kind: type[AnyRow]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def latest(rows: Iterable[Row]) -> dict[tuple[object, ...], Row]:
    """The last row of each key; a skipped measurement never hides one that was made."""
    last: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.us is not None or last.get(row.key) is None or last[row.key].us is None:
            last[row.key] = row
    return last


def command_of(arguments: Iterable[str]) -> str:
    """A program's command line; of paths the last part alone, as folders differ by machine."""
    return shlex.join(re.sub(r"[^=]*/", "", argument) for argument in arguments)


def commit(folder: Path) -> str:
    """The commit that is measured, with a "+" where files differ from it.

    `ADAMIX_COMMIT` in the environment stands for it where the files are a copy.
    """
    if named := os.environ.get("ADAMIX_COMMIT"):
        return named
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True,
                              text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + "+" * bool(changed.returncode) if head.stdout else "unknown"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(kind: object, cell: str) -> str | int | float | None:
    if kind is str:
        return cell
    inner = next((t for t in typing.get_args(kind) if t is not types.NoneType), kind)
    return inner(cell) if cell else None
