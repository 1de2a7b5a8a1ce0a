"""What every model of a pair is scored on: held-out prompts with answers, and general text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from answers import count_right
from rows import AccuracyRow
from task_families import GENERAL_TEXT, Example, held_out_examples, is_right
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adamix.calibration.texts import documents
from adamix.evaluation import (
    Prompt,
    Window,
    answered_window,
    read_prompts,
    score_windows,
    sliding_windows,
)

WINDOW = 512  # tokens of general text at a time


@dataclass(frozen=True)
class Questions:
    """The same for all of them."""

    tokenizer: PreTrainedTokenizerBase
    asked: list[Example]
    answered: list[Window]
    text: list[Window]
    right: Callable[[Example, str], bool]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, source: str | Path, count: int,
           text: Path | None, context: int) -> Questions:
        """`count` prompts at most, of a family or of a file of {"prompt", "answer"}; documents of
        a file of text, or this folder's general text; windows of `context` tokens at most."""
        if isinstance(source, Path):
            asked = [Example("", one.prompt, one.answer, one.prompt)
                     for one in read_prompts(source, count)]
        else:
            asked = held_out_examples(source, count)
        windows = [window for one in documents(text or [GENERAL_TEXT], tokenizer)
                   for window in sliding_windows(torch.tensor(tokenizer(one)["input_ids"]),
                                                 min(WINDOW, context), tokenizer.bos_token_id)]
        return cls(tokenizer, asked,
                   [answered_window(tokenizer, Prompt(one.prompt, one.answer)) for one in asked],
                   windows, is_exactly if isinstance(source, Path) else is_right)

    def score(self, row: AccuracyRow, model: PreTrainedModel, reference: PreTrainedModel | None
              ) -> AccuracyRow:
        """The row with what the model scores; without a reference no KL."""
        right = sum(count_right(model, self.tokenizer, self.asked, self.right).values())
        row = replace(row, prompts=len(self.asked), right=right)
        if reference is None:
            return row
        return replace(row, kl_prompts=score_windows(model, self.answered, reference)[1],
                       kl_text=score_windows(model, self.text, reference)[1])


def is_exactly(example: Example, text: str) -> bool:
    """Whether what a model wrote, up to its own end, is the answer: as `adamix.evaluate` counts."""
    return text.strip() == example.answer.strip()
