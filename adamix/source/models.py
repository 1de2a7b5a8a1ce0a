"""Checkpoints as transformers models and tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

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
        kind = _kind_of(transformers.AutoConfig.from_pretrained(folder))
        model = kind.from_pretrained(folder, dtype=dtype)
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
            return _kind_of(config).from_config(config)
    except MODEL_FAULTS as error:
        raise CheckpointError(
            f"{folder}: transformers cannot build this model: {reason(error)}") from error


def skeleton(folder: str | Path) -> transformers.PreTrainedModel:
    """The model of `folder/config.json` in fp32 and eval mode, its parameters on the meta device.

    Its buffers are there: those that a checkpoint does not hold (rotary frequencies) have their
    values, which `empty_model`'s lack.

    Raises:
        CheckpointError: transformers knows no causal language model of this config.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with _parameters_on_meta():
            model = _kind_of(config).from_config(config, dtype=torch.float32)
    except MODEL_FAULTS as error:
        raise CheckpointError(
            f"{folder}: transformers cannot build this model: {reason(error)}") from error
    return model.eval()


def _kind_of(config: transformers.PretrainedConfig) -> type:
    """transformers' class for models of text, or of images and text where it has no other."""
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    of_images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (transformers.AutoModelForImageTextToText if of_images and not known
            else transformers.AutoModelForCausalLM)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built in the block move each parameter to the meta device as they get it: before it
    is initialised, so that not even one page of it is touched."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else
                 nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


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
