"""Hugging Face checkpoints on disk, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamix.errors import CheckpointError, FingerprintError, reason
from adamix.parallel import available_cores, in_order

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "tokenizer.model", "chat_template.jinja", "chat_template.json",
          "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
SAMPLE_BYTES = 64 * 1024
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class Checkpoint:
    """A folder with `config.json` and safetensors weights, single or sharded.

    Args:
        source: a local folder, or the name of a model on the Hugging Face Hub.

    Raises:
        CheckpointError: it is missing, incomplete, truncated, or holds no safetensors.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self.folder = _locate(self.source)
        self._file_of = self._index()

    @cached_property
    def config(self) -> dict[str, object]:
        """`config.json`."""
        try:
            config = json.loads((self.folder / "config.json").read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{self.source} has no config.json") from None
        except ValueError as error:
            raise CheckpointError(f"{self.source}/config.json is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.source}/config.json is no JSON object")
        return config

    @property
    def names(self) -> list[str]:
        """The names of its tensors, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @cached_property
    def headers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name: (shape, dtype)} without reading any tensor."""
        headers = {}
        for file in sorted(set(self._file_of.values())):
            with self._open(file) as reader:
                for name in reader.keys():  # noqa: SIM118 (not a dict)
                    part = reader.get_slice(name)
                    dtype = DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise CheckpointError(f"{self.source}: {name} is {part.get_dtype()}, "
                                              f"expected one of {', '.join(DTYPES)}")
                    headers[name] = (tuple(part.get_shape()), dtype)
        missing = self._file_of.keys() - headers.keys()
        if missing:
            raise CheckpointError(f"{self.source}: {min(missing)} is in the index and in no shard")
        return headers

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        with self._open(self._file_of[name]) as reader:
            return reader.get_tensor(name)

    def read_slice(self, name: str, index: int) -> Tensor:
        """One slice of a tensor along its first dimension, without reading the others."""
        with self._open(self._file_of[name]) as reader:
            return reader.get_slice(name)[index : index + 1][0]

    def copied_hash(self) -> str:
        """SHA-256 of its configuration and tokenizer: the files of `COPIED` that it has."""
        digest = hashlib.sha256()
        for name in COPIED:
            if (self.folder / name).exists():
                data = (self.folder / name).read_bytes()
                digest.update(f"{name} {len(data)}\n".encode() + data)
        return digest.hexdigest()

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"{self.source} lacks its shard {file}") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.source}/{file} is damaged or truncated: {error}") from error

    def _index(self) -> dict[str, str]:
        if (self.folder / INDEX_FILE).exists():
            try:
                weight_map = json.loads((self.folder / INDEX_FILE).read_text())["weight_map"]
                if not all(isinstance(file, str) for file in weight_map.values()):
                    raise TypeError("a shard's name is no text")
                return dict(weight_map)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{self.source}/{INDEX_FILE} has no weight_map") from error
        if not (self.folder / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{self.source} has neither {SINGLE_FILE} nor {INDEX_FILE}: only safetensors are "
                f"read (save_pretrained writes them)")
        with self._open(SINGLE_FILE) as reader:
            return dict.fromkeys(reader.keys(), SINGLE_FILE)


def _locate(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise CheckpointError(f"{source} is no folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.txt",
                                                              "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source} is no folder, and the Hugging Face Hub has no such model: {reason(error)}"
        ) from error


@dataclass(frozen=True)
class TensorDigest:
    """What a fingerprint takes of one tensor."""

    label: bytes
    sha256: bytes  # of all its bytes; none where only samples are asked for
    sampled: bytes


def digest(name: str, tensor: Tensor, *, full: bool = True) -> TensorDigest:
    """A tensor's part of a fingerprint; many can be made side by side."""
    label = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
    data = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return TensorDigest(label, hashlib.sha256(data).digest() if full else b"",
                        b"".join(data[block] for block in _sampled_blocks(len(data))))


class Fingerprint:
    """Identifies a base by its tensors: names, shapes, dtypes and contents, in name order.

    `sha256` is the hash of all tensors' labels and hashes, and so covers every byte; `sampled`
    covers 64 KiB a tensor at fixed offsets (16 blocks of 4 KiB, evenly spread), which is enough to
    tell one model from another when it is loaded.
    """

    def __init__(self, *, full: bool = True) -> None:
        self._full = hashlib.sha256() if full else None
        self._sampled = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in the next tensor; call in name order."""
        self.take(digest(name, tensor, full=self._full is not None))

    def take(self, found: TensorDigest) -> None:
        """Take in what `digest` made of the next tensor; call in name order."""
        if self._full is not None:
            self._full.update(found.label + found.sha256)
        self._sampled.update(found.label + found.sampled)

    def result(self) -> dict[str, str]:
        """{"sha256": ..., "sampled": ...}, hexadecimal; the latter alone unless full."""
        full = {} if self._full is None else {"sha256": self._full.hexdigest()}
        return full | {"sampled": self._sampled.hexdigest()}


def fingerprint_of(base: Checkpoint, *, full: bool) -> dict[str, str]:
    """A base's fingerprint; not full, only the sampled parts of its files are read."""
    fingerprint = Fingerprint(full=full)
    with ThreadPoolExecutor(available_cores()) as threads:
        digests = in_order(threads, lambda name: digest(name, base.read(name), full=full),
                           base.names, available_cores())
        for found in digests:
            fingerprint.take(found)
    return fingerprint.result()


def _sampled_blocks(length: int, blocks: int = 16) -> Iterator[slice]:
    size = SAMPLE_BYTES // blocks
    if length <= SAMPLE_BYTES:
        yield slice(0, length)
        return
    for k in range(blocks):
        start = (length - size) * k // (blocks - 1)
        yield slice(start, start + size)


def check_fingerprint(found: dict[str, str], expected: dict[str, str], base: str) -> None:
    """Raise FingerprintError where a base is not the one a delta was made from."""
    if found["sha256"] != expected["sha256"]:
        raise FingerprintError(
            f"{base} is not the base of this delta: its tensors hash to {found['sha256'][:16]}…, "
            f"the delta was made from {expected['sha256'][:16]}…")


def context_of(checkpoint: Checkpoint) -> int | None:
    """The most tokens of a sequence that the model's config speaks of."""
    settings = checkpoint.config.get("text_config", checkpoint.config)
    return settings.get("max_position_embeddings") if isinstance(settings, dict) else None
