"""Calibration text -> token ids `[sequences, length]`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adamix.errors import CalibrationError, reason


def tokenize(source: str | Path | Sequence[str], tokenizer: PreTrainedTokenizerBase, *,
             sequences: int, length: int, seed: int) -> Tensor:
    """Documents, one after the other with the tokenizer's own begin and end, cut into windows.

    Args:
        source: a text file, a `.jsonl` file (a line a document: "text", "prompt" and "answer", or
            "messages"), a list of strings, or the name of a Hugging Face dataset with a "text"
            column (needs `datasets`; its train split is read).
        sequences: how many windows at most; chosen at random where the text has more.
        length: tokens a window; shorter only where the whole text is shorter.
        seed: of the choice.

    Returns:
        int64 `[windows, length]`.

    Raises:
        CalibrationError: the source does not exist, or holds no text.
    """
    wanted = sequences * length * 4  # a few times what is needed, to choose from
    ids: list[int] = []
    for document in documents(source, tokenizer):
        ids += tokenizer(document)["input_ids"]
        if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= wanted:
            break
    if len(ids) < 2:
        raise CalibrationError(f"the calibration source {_label(source)} holds no text")
    length = min(length, len(ids))
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[chosen[:sequences].sort().values]


def token_hash(tokens: Tensor) -> str:
    """SHA-256 of token ids, as int32."""
    return hashlib.sha256(tokens.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()


def _label(source: str | Path | Sequence[str]) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"list of {len(source)} strings"


def join_answer(prompt: str, answer: str) -> str:
    """A prompt with its answer, a space between them where neither brings one."""
    apart = prompt[-1:].isspace() or answer[:1].isspace() or not prompt
    return prompt + answer if apart else f"{prompt} {answer}"


def documents(source: str | Path | Sequence[str], tokenizer: PreTrainedTokenizerBase
              ) -> Iterator[str]:
    """The texts of a source as `tokenize` takes it, one by one, blank ones left out.

    Raises:
        CalibrationError: it does not exist or cannot be read.
    """
    return (text for text in _all_documents(source, tokenizer) if text.strip())


def _all_documents(source: str | Path | Sequence[str], tokenizer: PreTrainedTokenizerBase
                   ) -> Iterator[str]:
    if not isinstance(source, (str, Path)):
        yield from source
        return
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{path} cannot be read as text: {error}") from error
        if path.suffix == ".jsonl":
            yield from _json_lines(path, text, tokenizer)
        else:
            yield text
        return
    yield from _dataset(str(source))


def _json_lines(path: Path, text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = _document(json.loads(line), tokenizer)
        except Exception as error:  # a chat template is a program of the tokenizer's: any fault
            raise CalibrationError(f'{path}, line {number}: expected JSON with "text", "prompt" '
                                   f'and "answer", or "messages": {reason(error)}') from error
        yield document


def _document(record: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> str:
    if "messages" in record:
        text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        return text.removeprefix(tokenizer.bos_token or "")  # tokenizing puts it in front again
    parts = [record["text"]] if "text" in record else [record["prompt"], record["answer"]]
    if not all(isinstance(part, str) for part in parts):
        raise TypeError("a part is no text")
    return join_answer(*parts) if len(parts) == 2 else parts[0]


def _dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{name} is no file; to read it as a Hugging Face dataset, pip install datasets"
        ) from None
    try:
        for record in load_dataset(name, split="train", streaming=True):
            yield record["text"]
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"{name} is no file and no dataset with text: {reason(error)}") from error
