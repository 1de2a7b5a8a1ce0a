"""What a compression leaves beside its delta: a row a matrix, and what its plan came from."""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adamix.artifacts import PackedDelta
from adamix.errors import DeltaFileError
from adamix.naming import kind_of
from adamix.storage.tensors import save_tensors

LOG_FILE = "compression_log.csv"
SPECTRA_FILE = "spectra.safetensors"
TOKENS_FILE = "calibration.safetensors"
# Which Gram matrix a matrix was compressed by.
OWN = "own"  # that of its own inputs
LAYER = "layer"  # an expert's that saw too few tokens: that of all experts of its layer
IDENTITY = "identity"  # an embedding's, whose inputs are one-hot; a layer's that was never called


@dataclass(frozen=True)
class MatrixRow:
    """A row of compression_log.csv."""

    name: str
    kind: str
    out_features: int
    in_features: int
    rank: int
    v_bits_8: int  # rows of V at 8 bits, and so on
    v_bits_7: int
    v_bits_6: int
    v_bits_5: int
    v_bits_4: int
    v_bits_3: int
    v_bits_2: int
    v_bits_1: int
    u_bits_8: int  # columns of U at 8 bits, and so on
    u_bits_7: int
    u_bits_6: int
    u_bits_5: int
    u_bits_4: int
    u_bits_3: int
    u_bits_2: int
    u_bits_1: int
    bytes: int
    bits_per_weight: float
    relative_error: float  # of the output, on the calibration inputs
    seconds: float
    gram: str = OWN  # of what inputs: OWN, LAYER or IDENTITY

    @classmethod
    def of(cls, name: str, packed: PackedDelta, error: float, seconds: float, gram: str = OWN
           ) -> MatrixRow:
        """The row of one matrix."""
        return cls(name, kind_of(name), *packed.shape, packed.rank, *packed.v_counts,
                   *packed.u_counts, packed.nbytes, packed.bits_per_weight, error, seconds, gram)

    @property
    def v_counts(self) -> tuple[int, ...]:
        """Rows of V at 8, 7, .., 1 bits."""
        return (self.v_bits_8, self.v_bits_7, self.v_bits_6, self.v_bits_5, self.v_bits_4,
                self.v_bits_3, self.v_bits_2, self.v_bits_1)

    @property
    def u_counts(self) -> tuple[int, ...]:
        """Columns of U at 8, 7, .., 1 bits."""
        return (self.u_bits_8, self.u_bits_7, self.u_bits_6, self.u_bits_5, self.u_bits_4,
                self.u_bits_3, self.u_bits_2, self.u_bits_1)


@dataclass(frozen=True)
class Spectrum:
    """What one matrix's plan was chosen from."""

    singular_values: Tensor  # [candidates]
    errors: Tensor  # [candidates, widths + 1]; the last column is 0 bits
    widths: tuple[int, ...]


def write_log(folder: Path, rows: list[MatrixRow]) -> None:
    """Write compression_log.csv; the column `gram` where a row has LAYER."""
    columns = [field.name for field in fields(MatrixRow)
               if field.name != "gram" or any(row.gram == LAYER for row in rows)]
    with (folder / LOG_FILE).open("w", newline="") as file:
        csv.writer(file).writerow(columns)
        _write_rows(file, rows, columns)


def append_log(folder: Path, row: MatrixRow) -> None:
    """Add a row to compression_log.csv, in the columns that it has."""
    with (folder / LOG_FILE).open(newline="") as file:
        columns = next(csv.reader(file))
    with (folder / LOG_FILE).open("a", newline="") as file:
        _write_rows(file, [row], columns)


def _write_rows(file: TextIO, rows: list[MatrixRow], columns: list[str]) -> None:
    values = ([getattr(row, column) for column in columns] for row in rows)
    csv.writer(file).writerows([f"{value:.6g}" if isinstance(value, float) else value
                                for value in row] for row in values)


def read_log(folder: Path) -> list[MatrixRow]:
    """Read compression_log.csv.

    Raises:
        DeltaFileError: it is missing or not ours.
    """
    kinds = {"str": str, "int": int, "float": float}
    try:
        with (folder / LOG_FILE).open(newline="") as file:
            return [MatrixRow(**{field.name: kinds[str(field.type)](record[field.name])
                                 for field in fields(MatrixRow)
                                 if field.name != "gram" or field.name in record})
                    for record in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DeltaFileError(f"{folder / LOG_FILE} cannot be read: {error}") from error


def write_spectra(folder: Path, spectra: dict[str, Spectrum]) -> None:
    """Write spectra.safetensors, fp32."""
    tensors: dict[str, Tensor] = {}
    for name, spectrum in spectra.items():
        tensors[f"{name}.singular_values"] = spectrum.singular_values.float()
        tensors[f"{name}.errors"] = spectrum.errors.float()
        tensors[f"{name}.widths"] = torch.tensor(spectrum.widths, dtype=torch.int32)
    save_tensors(tensors, folder / SPECTRA_FILE)


def read_spectra(folder: Path) -> dict[str, Spectrum]:
    """Read spectra.safetensors; empty where there is none.

    Raises:
        DeltaFileError: it is damaged.
    """
    if not (folder / SPECTRA_FILE).exists():
        return {}
    try:
        return _spectra(load_file(folder / SPECTRA_FILE))
    except (SafetensorError, KeyError, OSError) as error:
        raise DeltaFileError(f"{folder / SPECTRA_FILE} cannot be read: {error}") from error


def _spectra(tensors: dict[str, Tensor]) -> dict[str, Spectrum]:
    names = [key.removesuffix(".widths") for key in tensors if key.endswith(".widths")]
    return {name: Spectrum(tensors[f"{name}.singular_values"], tensors[f"{name}.errors"],
                           tuple(tensors[f"{name}.widths"].tolist())) for name in names}


def write_tokens(folder: Path, tokens: Tensor) -> None:
    """Write the token ids that calibrated, int32 `[sequences, length]`."""
    save_tensors({"input_ids": tokens.to(torch.int32)}, folder / TOKENS_FILE)
