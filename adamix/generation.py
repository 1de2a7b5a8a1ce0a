"""generate: a base and its fine-tunes go on from prompts, in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from adamix.api import attach
from adamix.errors import AdamixError, CheckpointError, DeltaFileError, reason
from adamix.merging import restored_model
from adamix.source.checkpoints import Checkpoint
from adamix.source.models import MODEL_FAULTS, find_tokenizer, load_model


@dataclass(frozen=True)
class Generation:
    """What one model wrote after one prompt."""

    prompt: str
    finetune: str | None  # None: the base
    text: str


def generate(base: str | Path, deltas: Mapping[str, str | Path], prompts: Sequence[str], *,
             with_base: bool = False, max_new_tokens: int = 64, temperature: float = 0.0,
             device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
             ) -> list[Generation]:
    """Let a base and fine-tunes of it go on from prompts.

    One fine-tune alone is merged into the base in memory; several stay packed, and every row of
    the one batch is routed to its own.

    Args:
        base: a checkpoint.
        deltas: delta folders by name; none: the base answers.
        prompts: one for all, or one for each model (the base, where it takes part, comes first);
            where there is one model, any number.
        with_base: whether the base answers beside its fine-tunes.
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token, else drawn from torch's global random stream.
        device, dtype: of the model.

    Raises:
        AdamixError: a model cannot be read, or the prompts are not so many.
    """
    names = [*([None] if with_base or not deltas else []), *deltas]
    if len(names) == 1:
        names = names * len(prompts)
    prompts = list(prompts) * len(names) if len(prompts) == 1 else list(prompts)
    if len(prompts) != len(names):
        raise AdamixError(f"{len(names)} models take 1 prompt or {len(names)}, got {len(prompts)}")
    tokenizer = tokenizer_of([*deltas.values(), base])
    alone = set(names) != {None} and len(set(names)) == 1
    if alone:
        model = restored_model(base, next(iter(deltas.values()))).to(device, dtype)
    else:
        model = load_model(Checkpoint(base).folder, dtype).to(device)
    end = _end_tokens(tokenizer, [model.generation_config, *map(_generation_config,
                                                                deltas.values())])
    if not alone and deltas:
        attach(model, deltas, base=base).route(names)
    written = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens,
                     temperature=temperature, end=end)
    return [Generation(*one) for one in zip(prompts, names, written, strict=True)]


@torch.inference_mode()
def answer(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase,
           prompts: list[str], *, max_new_tokens: int, temperature: float = 0.0,
           end: Iterable[int] | None = None) -> list[str]:
    """What the model writes after each prompt, generated together with padding on the left.

    Greedy at temperature 0, else drawn from torch's global random stream. The model keeps the
    plain generation config that this sets: `generate` would fill in penalties from its own one.
    `end`: the ids that end an answer; None: the tokenizer's and the model's.
    """
    end = sorted(end) if end is not None else _end_tokens(tokenizer, [model.generation_config])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or [0])[0]
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if not all(rows):
        raise AdamixError("an empty prompt gives no token to go on from")
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    config = transformers.GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad,
                                           eos_token_id=end or None,
                                           **({"do_sample": False} | sampling))
    model.generation_config = config
    written = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    return tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)


def _end_tokens(tokenizer: transformers.PreTrainedTokenizerBase,
                configs: Iterable[transformers.GenerationConfig | None]) -> list[int]:
    """The ids that end an answer: the tokenizer's, and those of generation configs."""
    ends = {tokenizer.eos_token_id}
    for config in configs:
        found = config.eos_token_id if config else None
        ends |= set(found if isinstance(found, list) else [found])
    return sorted(ends - {None})


def _generation_config(delta: str | Path) -> transformers.GenerationConfig | None:
    if not (Path(delta) / "generation_config.json").exists():
        return None
    try:
        return transformers.GenerationConfig.from_pretrained(delta)
    except MODEL_FAULTS as error:
        raise DeltaFileError(
            f"{delta}/generation_config.json cannot be read: {reason(error)}") from error


def tokenizer_of(paths: list[str | Path]) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of the first that has one.

    Raises:
        CheckpointError: none has.
    """
    tokenizer = find_tokenizer(Path(path) if Path(path).is_dir() else Checkpoint(path).folder
                               for path in paths)
    if tokenizer is None:
        raise CheckpointError(f"no tokenizer in {' or '.join(map(str, paths))}")
    return tokenizer
