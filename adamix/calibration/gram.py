"""Calibration activations -> X Xᵀ of each distinct input of the model's linear layers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from adamix.errors import NonFiniteError
from adamix.parallel import in_order

CHUNK = 8  # sequences a forward pass; fixed, so that sums are added in one order on any machine
MAX_GRAM_BYTES = 4 * 2**30  # Gram matrices in memory, all threads'; more layers take more passes


@torch.inference_mode()
def shared_inputs(model: PreTrainedModel, tokens: Tensor, modules: dict[str, nn.Linear]
                  ) -> dict[str, list[str]]:
    """{first module: all modules that read the same tensor as it} (q/k/v; gate/up), in call order.

    Found by running a few tokens: modules share an input where they are handed the same tensor.
    A module that this forward pass never calls has no entry.
    """
    seen: list[tuple[Tensor, list[str]]] = []  # holding the tensors keeps their identities apart

    def record(name: str, X: Tensor) -> None:
        for tensor, names in seen:
            if tensor is X:
                names.append(name)
                return
        seen.append((X, [name]))

    hooks = _watch_inputs(modules, record)
    try:
        model(input_ids=tokens[:1, :8].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {names[0]: names for _, names in seen}


def _watch_inputs(modules: dict[str, nn.Linear], see: Callable[[str, Tensor], None]
                  ) -> list[RemovableHandle]:
    """Call see(name, input) before each call of a module."""
    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            see(name, given[0] if given else named["input"])
        return hook

    return [module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
            for name, module in modules.items()]


def passes(leaders: dict[str, int], max_bytes: int = MAX_GRAM_BYTES) -> Iterator[list[str]]:
    """Split modules {name: in_features} into runs whose fp32 Gram matrices fit `max_bytes`."""
    run: list[str] = []
    used = 0
    for name, width in leaders.items():
        needed = 4 * width * width
        if run and used + needed > max_bytes:
            yield run
            run, used = [], 0
        run.append(name)
        used += needed
    if run:
        yield run


def accumulate(model: PreTrainedModel, tokens: Tensor, modules: dict[str, nn.Linear], *,
               executor: Executor, ahead: int = 2,
               on_chunk: Callable[[int], None] = lambda n: None) -> dict[str, Tensor]:
    """X Xᵀ `[in, in]` fp32 of the inputs of each module over all tokens.

    Products and sums in fp32. A chunk of sequences is one forward pass; the chunks run side by side
    and their sums are added in the chunks' order.

    Args:
        model: the fine-tuned model, in eval mode.
        tokens: int64 `[sequences, length]`.
        modules: {name: module}, each with an input of its own.
        executor: runs the chunks.
        ahead: chunks at a time, each with Gram matrices of its own.
        on_chunk: told the number of sequences after each chunk.

    Raises:
        NonFiniteError: an activation is NaN or Inf; the sentence names the module.
    """
    local = threading.local()

    def add(name: str, X: Tensor) -> None:
        X = X.flatten(0, -2).float()
        local.grams[name] = local.grams.get(name, 0) + X.T @ X

    head = model.get_output_embeddings()
    whole = any(module is head for module in modules.values())
    takes = inspect.signature(model.forward).parameters
    options = {} if whole or "logits_to_keep" not in takes else {"logits_to_keep": 1}

    @torch.inference_mode()
    def run(chunk: Tensor) -> dict[str, Tensor]:
        local.grams = {}
        model(input_ids=chunk.to(model.device), use_cache=False, **options)
        return local.grams

    hooks = _watch_inputs(modules, add)
    totals: dict[str, Tensor] = {}
    try:
        chunks = tokens.split(CHUNK)
        for chunk, grams in zip(chunks, in_order(executor, run, chunks, ahead), strict=True):
            for name, gram in grams.items():
                totals[name] = totals[name].add_(gram) if name in totals else gram.clone()
            on_chunk(len(chunk))
    finally:
        for hook in hooks:
            hook.remove()
    for name, gram in totals.items():
        if not torch.isfinite(gram).all():
            raise NonFiniteError(f"the activations that enter {name} hold NaN or Inf")
    return totals
