"""Calibration activations -> X Xᵀ of each distinct input of the model's linear layers; of each
expert's, of the tokens that are routed to it."""

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

from adamix.calibration.layers import Expert, Layer, experts_one_by_one, in_features
from adamix.calibration.sums import ALONE, Share, TreeSum, chunks_of, group_of
from adamix.errors import NonFiniteError
from adamix.parallel import in_order

Chunk = TypeVar("Chunk")

CHUNK = 8  # sequences a forward pass; fixed, so that sums are added in one order on any machine
MAX_GRAM_BYTES = 4 * 2**30  # Gram matrices in memory, all threads'; more layers take more passes


@torch.inference_mode()
def shared_inputs(model: PreTrainedModel, tokens: Tensor, layers: dict[str, Layer]
                  ) -> dict[str, list[str]]:
    """{first layer: all layers that read the same tensor as it} (q/k/v; gate/up), in call order.

    Found by running a few tokens: layers share an input where they are handed the same tensor.
    A layer that this forward pass never calls has no entry; experts whose module is called have one
    each.
    """
    with experts_one_by_one(model), sharing(layers) as groups:
        model(input_ids=tokens[:1, :8].to(model.device), use_cache=False)
    return groups


@contextmanager
def sharing(layers: dict[str, Layer]) -> Iterator[dict[str, list[str]]]:
    """{first layer: all layers that read the same tensor}, of what runs in the block."""
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # holding the tensors keeps their ids apart
    groups: dict[str, list[str]] = {}
    experts: dict[nn.Module, list[str]] = {}
    for name, layer in layers.items():
        if isinstance(layer, Expert):
            experts.setdefault(layer.module, []).append(name)

    def record(name: str, X: Tensor) -> None:
        if id(X) not in seen:
            seen[id(X)] = X, groups.setdefault(name, [name])
        else:
            seen[id(X)][1].append(name)

    def called(module: nn.Module, given: object) -> None:
        groups.update({name: [name] for name in experts[module]})

    hooks = [module.register_forward_pre_hook(called) for module in experts]
    try:
        linears = {name: layer for name, layer in layers.items() if not isinstance(layer, Expert)}
        with _watching(linears, record):
            yield groups
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _watching(layers: dict[str, Layer], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(name, input) before each use of a layer in the block."""
    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            see(name, given[0] if given else next(iter(named.values())))
        return hook

    def watcher_of(stacks: dict[str, str]) -> Callable[[str, int, Tensor], None]:
        def watch(parameter: str, index: int, X: Tensor) -> None:
            name = f"{stacks.get(parameter)}.{index}"
            if name in layers:
                see(name, X)
        return watch

    hooks = [layer.register_forward_pre_hook(hook_of(name), with_kwargs=True)
             for name, layer in layers.items() if not isinstance(layer, Expert)]
    stacks: dict[nn.Module, dict[str, str]] = {}
    for layer in layers.values():
        if isinstance(layer, Expert):
            stacks.setdefault(layer.module, {})[layer.parameter] = layer.stack
    watchers = [(module.forward, watcher_of(names)) for module, names in stacks.items()]
    for run, watcher in watchers:
        run.see.append(watcher)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for run, watcher in watchers:
            run.see.remove(watcher)


def passes(leaders: dict[str, int], max_bytes: int = MAX_GRAM_BYTES) -> Iterator[list[str]]:
    """Split layers {name: in_features} into runs whose fp32 Gram matrices fit `max_bytes`."""
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


def accumulate(model: PreTrainedModel, tokens: Tensor, layers: dict[str, Layer], *,
               executor: Executor, ahead: int = 2, on_chunk: Callable[[int], None] = lambda n: None,
               seen: dict[str, int] | None = None, share: Share = ALONE) -> dict[str, Tensor]:
    """X Xᵀ `[in, in]` fp32 of the inputs of each layer over all tokens.

    Products and sums in fp32. A chunk of sequences is one forward pass; the chunks run side by side
    and their sums are added in the order of `sums.py`.

    Args:
        model: the fine-tuned model, in eval mode.
        tokens: int64 `[sequences, length]`.
        layers: {name: layer}, each with an input of its own.
        executor: runs the chunks.
        ahead: chunks at a time, each with Gram matrices of its own.
        on_chunk: told the number of sequences after each chunk.
        seen: gets {name: tokens that the layer saw}.
        share: of the chunks and the layers, where several processes do this together.

    Raises:
        NonFiniteError: an activation is NaN or Inf; the sentence names the layer.
    """
    head = model.get_output_embeddings()
    whole = any(layer is head for layer in layers.values())
    takes = inspect.signature(model.forward).parameters
    options = {} if whole or "logits_to_keep" not in takes else {"logits_to_keep": 1}

    def forward(chunk: Tensor) -> None:
        model(input_ids=chunk.to(model.device), use_cache=False, **options)

    with experts_one_by_one(model):
        return gram_matrices(forward, tokens.split(CHUNK), layers, executor=executor, ahead=ahead,
                             on_chunk=lambda chunk: on_chunk(len(chunk)), seen=seen, share=share,
                             in_place=ahead == 1 and model.device.type == "cuda")


def _add_product(X: Tensor, total: Tensor | None) -> Tensor:
    """total + Xᵀ X in fp32; the operands of 16 bits on a GPU, whose tensor cores sum in fp32, and
    in the total's place."""
    if not X.is_cuda:
        X = X.float()
        product = X.T @ X
        return product if total is None else total.add_(product)
    if X.dtype.itemsize == 2:
        return (torch.mm(X.T, X, out_dtype=torch.float32) if total is None else
                torch.addmm(total, X.T, X, out_dtype=torch.float32, out=total))
    X = X.float()
    return X.T @ X if total is None else total.addmm_(X.T, X)


def gram_matrices(forward: Callable[[Chunk], None], chunks: Sequence[Chunk],
                  layers: dict[str, Layer], *, executor: Executor, ahead: int,
                  on_chunk: Callable[[Chunk], None] = lambda chunk: None,
                  seen: dict[str, int] | None = None, share: Share = ALONE,
                  in_place: bool = False) -> dict[str, Tensor]:
    """X Xᵀ `[in, in]` fp32 of what enters the layers while `forward` runs over each chunk; experts
    must run one by one. With a share of the chunks, of those layers that are its own.

    Args:
        in_place: a chunk's products are added to the sums as they are made, which takes one matrix
            less of each layer; with one chunk at a time.

    Raises:
        NonFiniteError: an activation is NaN or Inf; the sentence names the layer.
    """
    local = threading.local()

    def add(name: str, X: Tensor) -> None:
        X = X.flatten(0, -2)
        local.grams[name] = _add_product(X, local.grams.pop(name, None))
        local.counts[name] = local.counts.get(name, 0) + len(X)

    @torch.inference_mode()
    def run(number: int) -> tuple[dict[str, Tensor], dict[str, int]]:
        group = group_of(number, len(chunks))
        local.grams = {name: total for name, one in sums.items()
                       if in_place and (total := one.reopen(group)) is not None}
        local.counts = {}
        forward(chunks[number])
        return local.grams, local.counts

    numbers = chunks_of(share.groups, len(chunks))
    sums: dict[str, TreeSum] = {}
    tokens: dict[str, int] = {}
    with _watching(layers, add):
        for number, (grams, counts) in zip(numbers, in_order(executor, run, numbers, ahead),
                                           strict=True):
            for name in list(grams):  # let go of once it is added: the next is in the making
                sums.setdefault(name, TreeSum(share.groups)).add(
                    group_of(number, len(chunks)), grams.pop(name))
                tokens[name] = tokens.get(name, 0) + counts.get(name, 0)
            on_chunk(chunks[number])
            share.check()
    totals, counted = share.combine({name: in_features(layer) for name, layer in layers.items()},
                                    {name: one.take() for name, one in sums.items()}, tokens)
    if seen is not None:
        seen.update(counted)
    for name, gram in totals.items():
        if not torch.isfinite(gram).all():
            raise NonFiniteError(f"the activations that enter {name} hold NaN or Inf")
    return totals
