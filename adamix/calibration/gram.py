"""Calibration activations -> X Xᵀ of each distinct input of the model's linear layers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adamix.errors import NonFiniteError
from adamix.parallel import in_order

Chunk = TypeVar("Chunk")

CHUNK = 8  # sequences a forward pass; fixed, so that sums are added in one order on any machine
MAX_GRAM_BYTES = 4 * 2**30  # Gram matrices in memory, all threads'; more layers take more passes


@torch.inference_mode()
def shared_inputs(model: PreTrainedModel, tokens: Tensor, modules: dict[str, nn.Linear]
                  ) -> dict[str, list[str]]:
    """{first module: all modules that read the same tensor as it} (q/k/v; gate/up), in call order.

    Found by running a few tokens: modules share an input where they are handed the same tensor.
    A module that this forward pass never calls has no entry.
    """
    with sharing(modules) as groups:
        model(input_ids=tokens[:1, :8].to(model.device), use_cache=False)
    return groups


@contextmanager
def sharing(modules: dict[str, nn.Linear]) -> Iterator[dict[str, list[str]]]:
    """{first module: all modules that read the same tensor}, of what runs in the block."""
    seen: list[tuple[Tensor, list[str]]] = []  # holding the tensors keeps their identities apart
    groups: dict[str, list[str]] = {}

    def record(name: str, X: Tensor) -> None:
        names = next((names for tensor, names in seen if tensor is X), None)
        if names is None:
            seen.append((X, groups.setdefault(name, [name])))
        else:
            names.append(name)

    with _watching(modules, record):
        yield groups


@contextmanager
def _watching(modules: dict[str, nn.Linear], see: Callable[[str, Tensor], None]
              ) -> Iterator[None]:
    """Call see(name, input) before each call of a module in the block."""
    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            see(name, given[0] if given else named["input"])
        return hook

    hooks = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
             for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    head = model.get_output_embeddings()
    whole = any(module is head for module in modules.values())
    takes = inspect.signature(model.forward).parameters
    options = {} if whole or "logits_to_keep" not in takes else {"logits_to_keep": 1}

    def forward(chunk: Tensor) -> None:
        model(input_ids=chunk.to(model.device), use_cache=False, **options)

    return gram_matrices(forward, tokens.split(CHUNK), modules, executor=executor, ahead=ahead,
                         on_chunk=lambda chunk: on_chunk(len(chunk)))


def gram_matrices(forward: Callable[[Chunk], None], chunks: Sequence[Chunk],
                  modules: dict[str, nn.Linear], *, executor: Executor, ahead: int,
                  on_chunk: Callable[[Chunk], None] = lambda chunk: None) -> dict[str, Tensor]:
    """X Xᵀ `[in, in]` fp32 of what enters the modules while `forward` runs over each chunk.

    Raises:
        NonFiniteError: an activation is NaN or Inf; the sentence names the module.
    """
    local = threading.local()

    def add(name: str, X: Tensor) -> None:
        X = X.flatten(0, -2).float()
        local.grams[name] = local.grams.get(name, 0) + X.T @ X

    @torch.inference_mode()
    def run(chunk: Chunk) -> dict[str, Tensor]:
        local.grams = {}
        forward(chunk)
        return local.grams

    totals: dict[str, Tensor] = {}
    with _watching(modules, add):
        for chunk, grams in zip(chunks, in_order(executor, run, chunks, ahead), strict=True):
            for name, gram in grams.items():
                totals[name] = totals[name].add_(gram) if name in totals else gram.clone()
            on_chunk(chunk)
    for name, gram in totals.items():
        if not torch.isfinite(gram).all():
            raise NonFiniteError(f"the activations that enter {name} hold NaN or Inf")
    return totals
