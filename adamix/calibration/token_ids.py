"""Calibration that comes as token ids: a tensor, or a file of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adamix.errors import CalibrationError, reason

Source = str | Path | Sequence[str] | Tensor  # whatever calibrates: texts.py reads the others
NAME = "input_ids"  # of the tensor in a .safetensors file, as in the one that a delta folder has
SUFFIXES = (".safetensors", ".npy")


def given_ids(source: Source, *, vocabulary: int, longest: int | None) -> Tensor | None:
    """Token ids as they are given, all of them; None where the source is text.

    Args:
        source: whole numbers `[sequences, length]` in a tensor, in a `.npy` file, or as
            "input_ids" (or the only tensor) of a `.safetensors` file.
        vocabulary: how many tokens the model knows.
        longest: the model's context in tokens, None where it names none.

    Returns:
        int64 `[sequences, length]` on the CPU.

    Raises:
        CalibrationError: they cannot be read, or are no token ids of this model.
    """
    if isinstance(source, Tensor):
        found, label = source.cpu(), "the calibration tensor"
    elif isinstance(source, (str, Path)) and Path(source).suffix in SUFFIXES:
        found, label = _read(Path(source)), str(source)
    else:
        return None
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex() \
            or found.dim() != 2 or found.shape[0] < 1 or found.shape[1] < 2:
        raise CalibrationError(f"{label} must hold token ids [sequences, length >= 2] in whole "
                               f"numbers, got {list(found.shape)} of {found.dtype}")
    ids = found.long()
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise CalibrationError(f"{label} must hold token ids of this model, 0..{vocabulary - 1}, "
                               f"got {ids.min().item()}..{ids.max().item()}")
    if longest is not None and ids.shape[1] > longest:
        raise CalibrationError(f"{label} has sequences of {ids.shape[1]} tokens, and the model's "
                               f"context is {longest}")
    return ids


def _read(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        tensors = load_file(path)
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        raise CalibrationError(f"{path} cannot be read as token ids: {reason(error)}") from error
    if NAME not in tensors and len(tensors) != 1:
        raise CalibrationError(f"{path} must hold a tensor {NAME}, or one alone; it has "
                               f"{', '.join(sorted(tensors)) or 'none'}")
    return tensors.get(NAME, next(iter(tensors.values())))
