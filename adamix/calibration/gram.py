"""Calibration activations -> X Xᵀ of each distinct input of the model's linear layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adamix.errors import NonFiniteError

CHUNK = 8  # sequences a forward pass; fixed, so that sums are added in one order on any machine
MAX_GRAM_BYTES = 4 * 2**30  # Gram matrices held at a time; more layers than that take more passes


@torch.inference_mode()
def shared_inputs(model: PreTrainedModel, tokens: Tensor, modules: dict[str, nn.Linear]
                  ) -> dict[str, list[str]]:
    """{first module: all modules that read the same tensor as it} (q/k/v; gate/up), in call order.

    Found by running a few tokens: modules share an input where they are handed the same tensor.
    A module that this forward pass never calls has no entry.
    """
    seen: list[tuple[Tensor, list[str]]] = []  # holding the tensors keeps their identities apart

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for tensor, names in seen:
                if tensor is inputs[0]:
                    names.append(name)
                    return
            seen.append((inputs[0], [name]))
        return hook

    hooks = [module.register_forward_pre_hook(record(name)) for name, module in modules.items()]
    try:
        model(input_ids=tokens[:1, :8].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {names[0]: names for _, names in seen}


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
               executor: Executor, on_chunk: Callable[[int], None] = lambda n: None
               ) -> dict[str, Tensor]:
    """X Xᵀ `[in, in]` fp32 of the inputs of each module over all tokens.

    Operands in the activations' own dtype, products and sums in fp32. A chunk of sequences is one
    forward pass; the chunks run side by side and their sums are added in the chunks' order.

    Args:
        model: the fine-tuned model, in eval mode.
        tokens: int64 `[sequences, length]`.
        modules: {name: module}, each with an input of its own.
        executor: runs the chunks.
        on_chunk: told the number of sequences after each chunk.

    Raises:
        NonFiniteError: an activation is NaN or Inf; the sentence names the module.
    """
    local = threading.local()

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            X = inputs[0].flatten(0, -2).float()
            local.grams[name] = local.grams.get(name, 0) + X.T @ X
        return hook

    @torch.inference_mode()
    def run(chunk: Tensor) -> dict[str, Tensor]:
        local.grams = {}
        model(input_ids=chunk.to(model.device), use_cache=False)
        return local.grams

    hooks = [module.register_forward_pre_hook(add(name)) for name, module in modules.items()]
    totals: dict[str, Tensor] = {}
    try:
        chunks = tokens.split(CHUNK)
        for chunk, grams in zip(chunks, executor.map(run, chunks), strict=True):
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
