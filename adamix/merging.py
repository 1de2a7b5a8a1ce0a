"""merge: a base and a delta -> the fine-tune again, as a checkpoint or as a model in memory."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from adamix.artifacts import ModelDelta
from adamix.errors import CheckpointError, DeltaFileError, FingerprintError, reason
from adamix.naming import read_indices
from adamix.progress import Progress, Silent
from adamix.source.checkpoints import (
    COPIED,
    INDEX_FILE,
    Checkpoint,
    Fingerprint,
    check_fingerprint,
)
from adamix.source.models import MODEL_FAULTS, empty_model
from adamix.storage.file import new_folder, read_delta, refuse_existing
from adamix.storage.tensors import save_tensors

SHARD_BYTES = 5 * 10**9
ROWS_AT_ONCE = 4096  # of a matrix whose rounding error is taken in fp64
FORMATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeSummary:
    """What `merge` did."""

    out: Path
    dtype: str
    tensors: int
    bytes: int  # of the safetensors files
    rounding_error: float  # Σ‖round(W) − W‖² / Σ‖Δ̂‖² over the compressed matrices
    worst_rounding_error: float  # the same of the matrix that loses most
    worst_matrix: str | None
    seconds: float


def load(path: str | Path) -> ModelDelta:
    """Read a delta folder.

    Raises:
        DeltaFileError: it is truncated, foreign, of another version, or its parts disagree.
    """
    return read_delta(Path(path))


def restore(base: Checkpoint, delta: ModelDelta) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the fine-tune by name, one in memory at a time.

    Compressed: fp32(base) + Δ̂, rows beyond the base's appended; of a tensor `[experts, ..]` those
    experts' that changed; whole: as stored; equal: the
    base's; left out: heads tied to the embedding, and what the fine-tune does not have.

    Raises:
        FingerprintError: before the first tensor where a name or a shape is not the base's, after
            the last one where any byte is not: nothing may be kept of an iteration that raised.
    """
    for name, tensor, _ in _restore_parts(base, delta):
        yield name, tensor


def _restore_parts(base: Checkpoint, delta: ModelDelta
                   ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The tensors of `restore`, each with its Δ̂ where it has one."""
    _check_headers(base, delta)
    fingerprint = Fingerprint()
    equal, transposed = set(_equal_names(delta)), delta.manifest.transposed_names
    stacks = _stacks(base, delta)
    for name in sorted({*base.names, *delta.whole}):
        base_tensor = base.read(name) if name in base else None
        if base_tensor is not None:
            fingerprint.add(name, base_tensor)
        if name in delta.whole:
            yield name, delta.whole[name], None
        elif base_tensor is not None and name in stacks:
            change = torch.zeros(base_tensor.shape)
            for index in stacks[name]:
                change[index] = _change(delta, f"{name}.{index}", transposed)
            yield name, base_tensor.float().add_(change), change
        elif base_tensor is not None and name in delta.matrices:
            change = _change(delta, name, transposed)
            yield name, _with_rows(base_tensor.float() + change, delta.extra_rows.get(name)), change
        elif base_tensor is not None and name in equal:
            yield name, _with_rows(base_tensor, delta.extra_rows.get(name)), None
    check_fingerprint(fingerprint.result(), delta.manifest.fingerprint, base.source)


def _change(delta: ModelDelta, name: str, transposed: set[str]) -> Tensor:
    """Δ̂ in the orientation in which a checkpoint has the weight."""
    change = delta.matrices[name].dequantize()
    return change.T if name in transposed else change


def _stacks(base: Checkpoint, delta: ModelDelta) -> dict[str, list[int]]:
    """{a tensor [experts, ..] of the base: the experts whose slices the delta changes}."""
    stacks: dict[str, list[int]] = {}
    for name in delta.matrices:
        if name not in base:
            stack, index = _slice(name)
            stacks.setdefault(stack, []).append(index)
    return stacks


def _slice(name: str) -> tuple[str, int]:
    """The tensor and the index that a slice's name is made of; -1 where it is no slice's."""
    stack, _, index = name.rpartition(".")
    return stack, int(index) if index.isascii() and index.isdigit() else -1


def _with_rows(tensor: Tensor, extra: Tensor | None) -> Tensor:
    return tensor if extra is None else torch.cat([tensor, extra.to(tensor.dtype)])


def merge(base: str | Path, delta: str | Path, out: str | Path, *,
          dtype: torch.dtype | str | None = None, progress: Progress | None = None) -> MergeSummary:
    """Write the fine-tune that a base and a delta folder stand for as an ordinary checkpoint.

    Args:
        base: the checkpoint that the delta was made from; every byte of it is compared.
        delta: the delta folder; its config and tokenizer are copied.
        out: the checkpoint's folder; must not exist.
        dtype: of all weights, "float32", "bfloat16" or "float16"; default: that of the fine-tune
            for compressed weights, the stored one for all others.
        progress: told about the tensors.

    Raises:
        AdamixError: a subclass names the fault in one sentence; nothing is left behind.
        ValueError: another dtype.
    """
    delta, out, progress = Path(delta), Path(out), progress or Silent()
    start = time.perf_counter()
    wanted = None if dtype is None else _dtype(dtype)
    refuse_existing(out)
    source, model_delta = Checkpoint(base), read_delta(delta)
    stored = model_delta.manifest.dtype
    main = wanted or _dtype(stored if stored in FORMATS else "float32")
    plan = _planned(source, model_delta, main, wanted)
    rounding = _Rounding()
    with new_folder(out) as folder:
        progress.stage("merging", len(plan))
        tensors = _rounded(source, model_delta, plan, rounding, progress)
        written = _write_shards(folder, plan, tensors)
        _copy_beside(delta, folder, main)
    worst = max(rounding.of_matrix, key=rounding.of_matrix.__getitem__, default=None)
    return MergeSummary(out, _short(main), len(plan), written, rounding.total,
                        rounding.of_matrix[worst] if worst else 0.0, worst,
                        time.perf_counter() - start)


def restored_model(base: str | Path, delta: str | Path, dtype: torch.dtype = torch.float32
                   ) -> transformers.PreTrainedModel:
    """The restored fine-tune in memory and eval mode, without a file in between; added up in fp32,
    then rounded to `dtype`.

    Raises:
        AdamixError: the base is another one, or a folder cannot be read.
    """
    source, folder = Checkpoint(base), Path(delta)
    model_delta = read_delta(folder)
    try:
        empty = empty_model(folder)
    except CheckpointError as error:
        raise DeltaFileError(str(error)) from error
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor
               for name, tensor in restore(source, model_delta)}
    try:
        model = type(empty).from_pretrained(None, config=empty.config, state_dict=tensors,
                                            dtype=dtype)
    except MODEL_FAULTS as error:
        raise DeltaFileError(
            f"{folder}: its tensors do not fit its config: {reason(error)}") from error
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


class _Rounding:
    """Sums up what rounding to the checkpoint's dtype loses."""

    def __init__(self) -> None:
        self._lost = self._whole = 0.0
        self.of_matrix: dict[str, float] = {}

    @property
    def total(self) -> float:
        return self._lost / self._whole if self._whole else 0.0

    def add(self, name: str, rounded: Tensor, exact: Tensor, change: Tensor) -> None:
        """‖rounded − exact‖² against ‖change‖², over the rows that `change` has."""
        rounded, exact, change = (tensor.flatten(0, -2) for tensor in (rounded, exact, change))
        lost = whole = 0.0
        for first in range(0, change.shape[0], ROWS_AT_ONCE):
            rows = slice(first, min(first + ROWS_AT_ONCE, change.shape[0]))
            lost += (rounded[rows].double() - exact[rows].double()).square().sum().item()
            whole += change[rows].double().square().sum().item()
        self._lost += lost
        self._whole += whole
        self.of_matrix[name] = lost / whole if whole else 0.0


def _rounded(base: Checkpoint, delta: ModelDelta, plan: dict[str, Tensor], rounding: _Rounding,
             progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """The restored tensors in the dtypes of the plan."""
    for name, tensor, change in _restore_parts(base, delta):
        rounded = tensor.to(plan[name].dtype).contiguous()
        if change is not None:
            rounding.add(name, rounded, tensor, change)
        yield name, rounded
        progress.advance()


def _planned(base: Checkpoint, delta: ModelDelta, main: torch.dtype, wanted: torch.dtype | None
             ) -> dict[str, Tensor]:
    """{name: an empty tensor of the shape and dtype that will be written}, in the files' order."""
    _check_headers(base, delta)
    planned = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in delta.whole.items()}
    planned |= {name: base.headers[name] for name in _equal_names(delta) if name in base}
    if wanted is not None:
        planned = {name: (shape, wanted if dtype.is_floating_point else dtype)
                   for name, (shape, dtype) in planned.items()}
    planned |= {name: (base.headers[name][0], main)
                for name in {*delta.matrices, *_stacks(base, delta)} if name in base}
    for name, extra in delta.extra_rows.items():
        shape, dtype = planned[name]
        planned[name] = ((shape[0] + extra.shape[0], *shape[1:]), dtype)
    return {name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in sorted(planned.items())}


def _write_shards(folder: Path, plan: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]
                  ) -> int:
    """Write each shard as soon as its tensors are there; the bytes of all."""
    shards = split_torch_state_dict_into_shards(
        plan, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES)
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in shards.filename_to_tensors}
    written = 0
    for name, tensor in tensors:
        file = shards.tensor_to_filename[name]
        waiting[file][name] = tensor
        if len(waiting[file]) == len(shards.filename_to_tensors[file]):
            save_tensors(waiting.pop(file), folder / file, {"format": "pt"})
            written += (folder / file).stat().st_size
    assert not waiting, f"no tensor came for {sorted(waiting)}"
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def _copy_beside(delta: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy config, generation config and tokenizer; the config gets the weights' dtype."""
    for name in COPIED:
        if (delta / name).exists():
            shutil.copyfile(delta / name, folder / name)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DeltaFileError(f"{delta}/config.json cannot be read as JSON: {error}") from error
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            keys = [key for key in ("dtype", "torch_dtype") if key in part]
            part |= dict.fromkeys(keys or (["dtype"] if part is config else []), _short(dtype))
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _check_headers(base: Checkpoint, delta: ModelDelta) -> None:
    """Raise FingerprintError where the base lacks a tensor that the delta changes or keeps."""
    transposed = delta.manifest.transposed_names
    shapes = {name: packed.shape[::-1] if name in transposed else packed.shape
              for name, packed in delta.matrices.items()}
    for name in (*shapes, *_equal_names(delta)):
        found = _shape_in(base, name)
        if found is None:
            raise FingerprintError(f"{base.source} is not the base of this delta: it has no {name}")
        if name in shapes and found != shapes[name]:
            raise FingerprintError(f"{base.source} is not the base of this delta: its {name} is "
                                   f"{list(found)}, the delta's {list(shapes[name])}")


def _shape_in(base: Checkpoint, name: str) -> tuple[int, ...] | None:
    """The shape of a tensor, or of a slice of one; None where the base has it not."""
    if name in base:
        return base.headers[name][0]
    stack, index = _slice(name)
    whole = base.headers[stack][0] if stack in base else ()
    return whole[1:] if len(whole) == 3 and 0 <= index < whole[0] else None


def _equal_names(delta: ModelDelta) -> list[str]:
    return [name for kind, indices in delta.manifest.equal.items()
            for name in read_indices(kind, indices)]


def _dtype(name: torch.dtype | str) -> torch.dtype:
    short = _short(name) if isinstance(name, torch.dtype) else name
    if short not in FORMATS:
        raise ValueError(f"dtype must be one of {', '.join(FORMATS)}, got {short}")
    return getattr(torch, short)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
