"""One way to write safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

READABLE = 0o644  # save_file leaves its files to their owner alone


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
                 ) -> None:
    """Write `tensors` to `path`, readable for everybody."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=metadata)
    path.chmod(READABLE)
