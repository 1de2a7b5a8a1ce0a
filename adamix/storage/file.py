"""The delta folder, byte by byte.

    delta.safetensors        matrices and the tensors kept whole, stacked by kind of layer:
                               K.words   [words] int32         the matrices of kind K one after the
                                                               other, each as drawn in
                                                               csrc/layout/packed_layout.h
                               K.scales  [components] fp32     likewise
                               K.counts  [matrices, 16] int32  rows of V at 8, 7, .., 1 bits, then
                                                               columns of U
                               whole:K   [tensors, ...]        of one kind, shape and dtype
                               rows:N    [rows, hidden]        what the base's vocabulary N lacks
    delta_config.json        what it is: versions, base and its fingerprint, config, calibration,
                             and what became of each tensor; K is a name with its numbers as "*",
                             which stand beside it as "0-27"; kinds in "transposed" (format 4,
                             all others are format 3) are [in, out] in a checkpoint; a K that ends
                             in "*" has the slices, one an expert, of a tensor [experts, ..]
    compression_log.csv      a row a matrix (not needed to load)
    spectra.safetensors      singular values and simulated errors (not needed to load)
    calibration.safetensors  the token ids that calibrated (not needed to load)
    config.json, tokenizer.* copies of the fine-tune's

Above 5 GB `delta.safetensors` is split into `delta-00001-of-0000N.safetensors` with
`delta.safetensors.index.json`, as Hugging Face checkpoints are. A folder is written under a
temporary name and renamed, so one that exists is whole.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamix import ops
from adamix.artifacts import Manifest, ModelDelta, PackedDelta
from adamix.errors import DeltaFileError, OutputError
from adamix.naming import group_by_kind, read_indices
from adamix.storage.tensors import save_tensors

FORMAT = "adamix"
FORMAT_VERSION = 3
TRANSPOSED_VERSION = 4  # of a folder with matrices that checkpoints hold transposed; else as before
DELTA_FILE = "delta.safetensors"
INDEX_FILE = "delta.safetensors.index.json"
CONFIG_FILE = "delta_config.json"
SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16",
               torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
               torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # as safetensors has them
METADATA = {"format": FORMAT}  # one key: safetensors writes several in no fixed order


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` if the block ends well, else vanishes.

    Raises:
        OutputError: `out` exists, cannot be made, or the disk is full.
    """
    refuse_existing(out)
    with made_parents(out):
        try:
            partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        except OSError as error:
            raise OutputError(f"cannot write to {out.parent}: {error.strerror}") from error
        try:
            yield partial
            partial.chmod(0o755)
            refuse_existing(out)
            partial.rename(out)
        except (OSError, SafetensorError) as error:
            if is_disk_full(error):
                raise OutputError(
                    f"the disk of {out.parent} is full: nothing was written") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def made_parents(out: Path) -> Iterator[None]:
    """The folders above `out` for the block; those that were made for it go again if it leaves
    nothing in them.

    Raises:
        OutputError: they cannot be made.
    """
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        for parent in made:
            with suppress(OSError):  # something is in it
                parent.rmdir()


def refuse_existing(out: Path) -> None:
    """Raise OutputError where `out` exists; called before any long work."""
    try:
        exists = out.exists() or out.is_symlink()
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}") from error
    if exists:
        raise OutputError(f"{out} exists: choose another output folder or remove it")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room."""
    code = getattr(error, "errno", None)
    return code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def delta_tensors(delta: ModelDelta) -> dict[str, Tensor]:
    """The tensors of `delta.safetensors`, by name."""
    tensors: dict[str, Tensor] = {}
    shapes = {name: packed.shape for name, packed in delta.matrices.items()}
    for kind, names in group_by_kind(shapes).items():
        packed = [delta.matrices[name] for name in names]
        tensors[f"{kind}.words"] = torch.cat([p.words for p in packed])
        tensors[f"{kind}.scales"] = torch.cat([p.scales for p in packed])
        tensors[f"{kind}.counts"] = torch.tensor([p.v_counts + p.u_counts for p in packed],
                                                dtype=torch.int32)
    traits = {name: (tensor.shape, tensor.dtype) for name, tensor in delta.whole.items()}
    for kind, names in group_by_kind(traits).items():
        tensors[f"whole:{kind}"] = torch.stack([delta.whole[name] for name in names])
    for name, rows in delta.extra_rows.items():
        tensors[f"rows:{name}"] = rows
    return tensors


def header_bytes(shapes: dict[str, tuple[int, ...]], data_bytes: int) -> int:
    """An upper bound of a safetensors header for tensors of these shapes, `data_bytes` in all."""
    last = 10 ** len(str(data_bytes)) - 1
    return _header_length({name: ("BF16_", shape, (last, last)) for name, shape in shapes.items()})


def file_bytes(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """A safetensors file of tensors with these dtypes and shapes."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = DTYPE_NAMES[dtype], shape, (begin, end)
    return _header_length(entries) + end


def _header_length(entries: dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]) -> int:
    header: dict[str, object] = {"__metadata__": METADATA}
    for name, (dtype, shape, offsets) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return 8 + -(-len(text.encode()) // 8) * 8


def manifest_text(manifest: Manifest) -> str:
    """`delta_config.json`, to the byte."""
    version = TRANSPOSED_VERSION if manifest.transposed else FORMAT_VERSION
    body = {"format": FORMAT, "format_version": version,
            "layout_version": ops.LAYOUT_VERSION} | manifest.to_dict()
    return _outline(body) + "\n"


def _outline(body: dict[str, object], depth: int = 0) -> str:
    """JSON with one line an entry, lists kept on their line."""
    indent = " " * (depth + 1)
    lines = []
    for key, value in body.items():
        nested = isinstance(value, dict) and value and depth < 1
        text = _outline(value, depth + 1) if nested else json.dumps(value, ensure_ascii=False)
        lines.append(f"{indent}{json.dumps(key, ensure_ascii=False)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def write_delta(delta: ModelDelta, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write `delta.safetensors` (or its shards) and `delta_config.json`; the bytes written."""
    tensors = delta_tensors(delta)
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="delta{suffix}.safetensors", max_shard_size=shard_bytes)
    files = plan.filename_to_tensors or {DELTA_FILE: []}  # a fine-tune that is the base
    for filename, names in files.items():
        save_tensors({name: tensors[name] for name in names}, folder / filename, METADATA)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    (folder / CONFIG_FILE).write_text(manifest_text(delta.manifest))
    return delta_bytes(folder)


def delta_bytes(folder: Path) -> int:
    """Bytes on disk of all that loading needs."""
    return sum(path.stat().st_size for path in folder.iterdir() if is_delta_file(path))


def is_delta_file(path: Path) -> bool:
    """Whether a file of a delta folder holds what loading needs."""
    return (path.name == CONFIG_FILE or path.name == INDEX_FILE
            or (path.name.startswith("delta") and path.suffix == ".safetensors"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check `delta_config.json`.

    Raises:
        DeltaFileError: there is none, or it is not ours, or of another version.
    """
    path = folder / CONFIG_FILE
    try:
        body = json.loads(path.read_text())
    except FileNotFoundError:
        raise DeltaFileError(f"{folder} is no delta: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError) as error:
        raise DeltaFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DeltaFileError(f"{path} is not an adamix delta: its format is "
                             f"{body.get('format') if isinstance(body, dict) else body!r}")
    version = TRANSPOSED_VERSION if body.get("transposed") else FORMAT_VERSION
    for key, ours in (("format_version", version), ("layout_version", ops.LAYOUT_VERSION)):
        if body.get(key) != ours:
            raise DeltaFileError(f"{path} has {key} {body.get(key)}, this adamix reads {ours}: "
                                 f"compress again or install the matching adamix")
    try:
        return Manifest.from_dict(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeltaFileError(f"{path} is incomplete: {error}") from error


def read_delta(folder: Path) -> ModelDelta:
    """Read a delta folder.

    Raises:
        DeltaFileError: it is truncated, foreign, of another version, or its parts disagree.
    """
    manifest = read_manifest(folder)
    tensors = _read_tensors(folder)
    try:
        matrices = _read_matrices(manifest, tensors)
        whole = {}
        for kind, indices in manifest.whole.items():
            stacked = tensors.pop(f"whole:{kind}")
            names = read_indices(kind, indices)
            whole.update(zip(names, stacked.unbind(), strict=True))
        extra_rows = {name: tensors.pop(f"rows:{name}") for name in manifest.extra_rows}
    except KeyError as error:
        raise DeltaFileError(f"{folder / DELTA_FILE} lacks the tensor {error}") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise DeltaFileError(f"{folder / DELTA_FILE} does not fit its config: {error}") from error
    if tensors:
        raise DeltaFileError(f"{folder / DELTA_FILE} holds a tensor that {CONFIG_FILE} does not "
                             f"name: {next(iter(tensors))}")
    return ModelDelta(matrices, whole, extra_rows, manifest)


def _read_matrices(manifest: Manifest, tensors: dict[str, Tensor]) -> dict[str, PackedDelta]:
    matrices = {}
    for kind, (out_features, in_features, indices) in manifest.compressed.items():
        words, scales = tensors.pop(f"{kind}.words"), tensors.pop(f"{kind}.scales")
        counts = tensors.pop(f"{kind}.counts")
        dtypes = (words.dtype, scales.dtype, counts.dtype)
        if dtypes != (torch.int32, torch.float32, torch.int32):
            raise ValueError(f"{kind} must be int32 words, fp32 scales and int32 counts, got "
                             f"{', '.join(map(str, dtypes))}")
        if not torch.isfinite(scales).all():
            raise ValueError(f"{kind} has a scale that is NaN or Inf")
        first_word = first_scale = 0
        for name, row in zip(read_indices(kind, indices), counts.tolist(), strict=True):
            v_counts, u_counts = _read_counts(name, row)
            length = ops.v_words(in_features, v_counts) + ops.u_words(out_features, u_counts)
            last_word, last_scale = first_word + length, first_scale + sum(v_counts)
            matrices[name] = PackedDelta(
                words[first_word:last_word], scales[first_scale:last_scale], v_counts, u_counts,
                (out_features, in_features))
            first_word, first_scale = last_word, last_scale
        if first_word != words.numel() or first_scale != scales.numel():
            raise ValueError(f"{kind} has {words.numel()} words and {scales.numel()} scales where "
                             f"its counts ask for {first_word} and {first_scale}")
    return matrices


def _read_counts(name: str, row: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """V's counts and U's of a row of `K.counts`."""
    v_counts, u_counts = tuple(row[: ops.MAX_BITS]), tuple(row[ops.MAX_BITS :])
    if len(row) != 2 * ops.MAX_BITS or min(row) < 0 or sum(v_counts) != sum(u_counts):
        raise ValueError(f"{name} has counts {list(v_counts)} of V's rows and {list(u_counts)} of "
                         f"U's columns")
    return v_counts, u_counts


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = [folder / DELTA_FILE]
    try:
        if (folder / INDEX_FILE).exists():
            index = json.loads((folder / INDEX_FILE).read_text())
            files = sorted({folder / str(name) for name in index["weight_map"].values()})
        tensors = {}
        for file in files:
            with safe_open(file, framework="pt") as reader:
                if (reader.metadata() or {}).get("format") != FORMAT:
                    raise DeltaFileError(f"{file} was not written by adamix: its metadata say "
                                         f"{reader.metadata()}")
                for name in reader.keys():  # noqa: SIM118 (not a dict)
                    tensors[name] = reader.get_tensor(name)
    except FileNotFoundError as error:
        missing = Path(error.filename or "").name or error
        raise DeltaFileError(f"{folder} is no whole delta: {missing} is missing") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DeltaFileError):
            raise
        raise DeltaFileError(f"{files[0]} is damaged or truncated: {error}") from error
    return tensors
