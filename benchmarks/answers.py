"""Scoring models in memory, and the size of a LoRA: what train_pair and bench_accuracy share."""

from __future__ import annotations

from collections.abc import Callable

from task_families import MAX_NEW_TOKENS, Example, is_right
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adamix.generation import answer

# The linear layers of a Llama's blocks: a method compresses these, and a LoRA has factors of these.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AT_ONCE = {"cuda": 250, "cpu": 25}  # prompts generated together


def count_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Example],
                right: Callable[[Example, str], bool] = is_right) -> dict[str, int]:
    """Right answers by task; greedy. The model is left in eval mode."""
    model.eval()
    counts = {example.task: 0 for example in asked}
    size = AT_ONCE[model.device.type]
    for first in range(0, len(asked), size):
        batch = asked[first : first + size]
        texts = answer(model, tokenizer, [example.prompt for example in batch],
                       max_new_tokens=MAX_NEW_TOKENS)
        for example, text in zip(batch, texts, strict=True):
            counts[example.task] += right(example, text)
    return counts


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS}


def lora_bytes(model: nn.Module, rank: int) -> int:
    """16-bit bytes of an adapter of all these layers."""
    return 2 * rank * sum(sum(layer.weight.shape) for layer in block_linears(model).values())


def lora_rank(model: nn.Module, ratio: float) -> int:
    """The rank whose 16-bit bytes come nearest to those of the model over `ratio`: rounding down
    would cost a small rank, and so the LoRA of a high ratio, an eighth of its size.

    Raises:
        SystemExit: that is none.
    """
    allowed = 2 * sum(parameter.numel() for parameter in model.parameters()) / ratio
    rank = round(allowed / lora_bytes(model, 1))
    if rank < 1:
        raise SystemExit(f"ratio {ratio:g} allows {allowed:.0f} bytes, and a LoRA of rank 1 takes "
                         f"{lora_bytes(model, 1)}")
    return rank
