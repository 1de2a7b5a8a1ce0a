"""Checkpoints as transformers models and tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from adamix.errors import CheckpointError, reason

# What transformers raises over a config or weights that it cannot make a model of.
MODEL_FAULTS = (ValueError, KeyError, TypeError, OSError, RuntimeError, ImportError,
                SafetensorError, StrictDataclassError)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32
               ) -> transformers.PreTrainedModel:
    """The model of a checkpoint's folder, in eval mode.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except MODEL_FAULTS as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {reason(error)}") from error
    return model.eval()


def empty_model(folder: str | Path) -> transformers.PreTrainedModel:
    """The model of `folder/config.json` on the meta device, without weights.

    Raises:
        CheckpointError: transformers knows no causal language model of this config.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except MODEL_FAULTS as error:
        raise CheckpointError(
            f"{folder}: transformers cannot build this model: {reason(error)}") from error


def find_tokenizer(folders: Iterable[Path]) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer of the first folder that has one, None where none has.

    Raises:
        CheckpointError: its files are damaged.
    """
    for folder in folders:
        if any((folder / name).exists() for name in TOKENIZER_FILES):
            try:
                return transformers.AutoTokenizer.from_pretrained(folder)
            except (ValueError, KeyError, OSError, TypeError) as error:
                raise CheckpointError(
                    f"{folder}: its tokenizer cannot be read: {reason(error)}") from error
    return None
