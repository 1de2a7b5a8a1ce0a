"""What the model's own code says of its tensors, from an empty (meta-device) model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from adamix.source.models import empty_model


@dataclass(frozen=True)
class Architecture:
    """Names of weights by what they are used as."""

    linears: frozenset[str]  # every nn.Linear's weight, the output head's included
    embedding: str | None  # the input embedding's weight
    head: str | None  # the output head's weight (`lm_head.weight`), if it has one
    tied: bool  # the head's weight is the embedding's
    vocabulary: int  # rows of the input embedding
    hidden: int  # size of a hidden state


def describe(folder: Path) -> Architecture:
    """Build the model of `folder/config.json` without weights and read off its layers.

    Raises:
        CheckpointError: transformers knows no causal language model of this config.
    """
    model = empty_model(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linears, embedding_name, head_name = set(), None, None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears.add(f"{name}.weight")
        if module is embedding:
            embedding_name = f"{name}.weight"
        if module is head:
            head_name = f"{name}.weight"
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return Architecture(frozenset(linears), embedding_name, head_name, tied and head is not None,
                        embedding.weight.shape[0], model.config.get_text_config().hidden_size)
