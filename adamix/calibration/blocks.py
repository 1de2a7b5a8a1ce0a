"""X Xᵀ of a decoder's linear layers with one of its blocks in memory at a time.

No list of architectures: the blocks are the modules of the largest `nn.ModuleList`, called one
after the other on hidden states. In a first pass every block is a stand-in that hands its input on
and notes what else it was called with (masks, position embeddings ..), so what precedes the blocks
runs in the model's own code; then each block runs over all chunks of tokens; then a last pass, with
stand-ins that hand on the last block's output, runs what follows them. A model that does not fit
(blocks that see more of each other than hidden states, weights under other names) is `Unsuited`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adamix.calibration.filling import empty, fill, move_buffers, own_tensors
from adamix.calibration.gram import CHUNK, gram_matrices, passes, sharing
from adamix.calibration.layers import ExpertGrams, find_layers, in_features
from adamix.calibration.states import OnDisk
from adamix.calibration.sums import ALONE, Share, chunks_of
from adamix.errors import AdamixError, reason
from adamix.experts import OneByOne, is_experts

CPU = torch.device("cpu")
HIDDEN = "hidden_states"  # what transformers calls them where they are passed by name


class Unsuited(Exception):
    """The model's blocks cannot be run one at a time; the text says why."""


class _Stop(Exception):
    """Ends a forward pass that has shown what was asked of it."""


@dataclass(frozen=True)
class _Call:
    """What a block is called with beside the hidden states."""

    rest: tuple[object, ...]
    named: dict[str, object]
    by_name: bool  # the hidden states are passed by name

    @classmethod
    def of(cls, given: tuple[object, ...], named: dict[str, object]) -> tuple[Tensor, _Call]:
        """The hidden states and the rest of a call."""
        by_name = not given
        hidden = named.get(HIDDEN) if by_name else given[0]
        if not isinstance(hidden, Tensor):
            raise Unsuited("a block is called without hidden states")
        others = {name: value for name, value in named.items() if name != HIDDEN}
        return hidden, cls(given[1:], others, by_name)

    def on(self, block: Callable[..., object], hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        named = self.named | ({HIDDEN: hidden} if self.by_name else {})
        output = block(*(() if self.by_name else (hidden,)), *self.rest, **named)
        return output[0] if isinstance(output, tuple) else output

    def map(self, function: Callable[[Tensor], Tensor]) -> _Call:
        """The same call with every tensor replaced."""
        return _Call(_map(self.rest, function),
                     {name: _map(value, function) for name, value in self.named.items()},
                     self.by_name)


def _map(value: object, function: Callable[[Tensor], Tensor]) -> object:
    """A plain value with its tensors replaced. What could carry something from one block to the
    next (a cache, a list, a dict) is none."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is tuple:
        return tuple(_map(part, function) for part in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    raise Unsuited(f"its blocks are handed a {type(value).__name__}")


class BlockStream:
    """A model whose parameters stay on the meta device but for those of the block at work.

    Args:
        model: parameters on the meta device, other than persistent buffers with their values; in
            eval mode.
        tokens: int64 `[sequences, length]`, run in chunks of `gram.CHUNK`.
        wanted: names of the layers whose inputs are asked for, as `find_layers` has them.
        shapes: of the checkpoint's tensors, by name.
        read: one of them, as stored.
        states: a folder for the hidden states between two blocks; None keeps them in memory.
        device, dtype: of the block at work and the hidden states.
        share: of the chunks and the layers, where several processes do this together.

    Raises:
        Unsuited: the model's blocks cannot be run one at a time.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, wanted: Collection[str],
                 shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor],
                 states: Path | None = None, device: torch.device = CPU,
                 dtype: torch.dtype = torch.float32, share: Share = ALONE) -> None:
        self._device, self._dtype, self._share = device, dtype, share
        self._in_place = device.type == "cuda"  # one chunk at a time keeps a GPU busy
        move_buffers(model, device)
        self._model, self._shapes, self._read = model, shapes, read
        self._prefix, self._blocks = _find_blocks(model)
        self._names = {module: name for name, module in model.named_modules()}
        self._linears = find_layers(model, wanted)
        self.few_tokens: set[str] = set()  # experts that got the Gram matrix of all of their layer
        for module in model.modules():
            if is_experts(module):
                module.forward = OneByOne(module)
        # How many None a block gives back behind the hidden states, in a tuple; None: no tuple.
        self._behind: list[int | None] = [None] * len(self._blocks)
        self._chunks = tokens.to(device).split(CHUNK)
        self._mine = chunks_of(share.groups, len(self._chunks))
        # Of each chunk that is ours: what enters the block at work.
        self._states: MutableMapping[int, Tensor] = {} if states is None else OnDisk(states)
        self._calls: dict[int, list[_Call]] = {}  # {chunk: of each block}; the first one's always
        self._groups: list[dict[str, list[str]]] = [{} for _ in self._blocks]
        try:
            with self._filled_when_called():
                self._enter()
        except (Unsuited, AdamixError, MemoryError):
            raise
        except Exception as error:  # the code of any model runs here, in ways it was not meant to
            raise Unsuited(f"its blocks do not run by themselves: {reason(error)}") from error

    @property
    def groups(self) -> dict[str, list[str]]:
        """{first module: all modules that read the same tensor as it}, in call order."""
        return {leader: modules for group in (*self._groups, self._outside)
                for leader, modules in group.items()}

    # --- what precedes and follows the blocks ----------------------------------------------------

    def _enter(self) -> None:
        """Run what precedes the blocks for the first chunk, with what follows them, and for all
        others of ours."""
        probes = [copy.deepcopy(block) for block in self._blocks]
        outside = {name: module for name, module in self._linears.items()
                   if not name.startswith(f"{self._prefix}.")}
        for number in sorted({0, *self._mine}):
            calls: list[_Call] = []
            entered: list[Tensor] = []
            known: dict[int, tuple[Tensor, Tensor]] = {}

            def stand_in(index: int, hidden: Tensor, call: _Call, number: int = number,
                         calls: list[_Call] = calls, entered: list[Tensor] = entered,
                         known: dict[int, tuple[Tensor, Tensor]] = known) -> Tensor:
                if index != len(calls) or (index and hidden is not entered[0]):
                    raise Unsuited("more than hidden states passes between its blocks")
                if not index:
                    entered.append(hidden)
                    if number in self._mine:
                        self._states[number] = hidden
                if not number:
                    self._probe(index, probes[index], hidden, call)
                calls.append(self._deduplicated(index, call, known))
                if number and index == len(self._blocks) - 1:
                    raise _Stop
                return hidden

            with sharing({} if number else outside) as groups:
                self._run_outside(self._chunks[number], stand_in)
            if not number:
                self._outside = groups
            if len(calls) != len(self._blocks):
                raise Unsuited("not all of its blocks are called")
            self._calls[number] = calls

    def _deduplicated(self, index: int, call: _Call, known: dict[int, tuple[Tensor, Tensor]]
                      ) -> _Call:
        """The call with the tensors of the first chunk's where they are equal: masks are large.

        `known` holds what was found for this chunk, {id: (tensor, the one to keep)}.
        """
        first = _tensors(self._calls[0][index]) if self._calls else []

        def kept(tensor: Tensor) -> Tensor:
            if id(tensor) not in known:
                equal = (one for one in first if one.shape == tensor.shape
                         and one.dtype == tensor.dtype and torch.equal(one, tensor))
                known[id(tensor)] = tensor, next(equal, tensor)
            return known[id(tensor)][1]

        return call.map(kept)

    def _probe(self, index: int, probe: nn.Module, hidden: Tensor, call: _Call) -> None:
        """Run a copy of a block on the meta device: what it gives back, and which of its layers
        share an input."""
        name = f"{self._prefix}.{index}"
        self._check(self._blocks[index])
        linears = find_layers(probe, self._linears, f"{name}.")
        probe.to("meta")
        moved, outputs = call.map(lambda tensor: tensor.to("meta")), []

        def see(module: nn.Module, given: object, output: object) -> None:
            outputs.append(output)

        with sharing(linears) as groups:
            probe.register_forward_hook(see)
            moved.on(probe, hidden.to("meta"))
        output = outputs[0]
        self._behind[index] = len(output) - 1 if isinstance(output, tuple) else None
        first, *others = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, Tensor) or first.shape != hidden.shape or any(
                other is not None for other in others):
            raise Unsuited("its blocks give back more than hidden states")
        self._groups[index] = groups

    @torch.inference_mode()
    def _run_outside(self, chunk: Tensor,
                     stand_in: Callable[[int, Tensor, _Call], Tensor]) -> None:
        """The model's forward pass up to its output head, with stand-ins for the blocks."""
        def forward(index: int, *given: object, **named: object) -> object:
            hidden, call = _Call.of(given, named)
            output = stand_in(index, hidden, call)
            behind = self._behind[index]
            return output if behind is None else (output, *[None] * behind)

        def stop(*given: object, **named: object) -> None:
            raise _Stop

        head = self._model.get_output_embeddings()
        replaced: list[tuple[nn.Module, Callable[..., object]]] = [
            (block, partial(forward, index)) for index, block in enumerate(self._blocks)]
        replaced += [] if head is None else [(head, stop)]
        try:
            for module, function in replaced:
                module.forward = function
            self._model(input_ids=chunk, use_cache=False)
        except _Stop:
            pass
        finally:
            for module, _ in replaced:
                del module.forward

    @contextmanager
    def _filled_when_called(self) -> Iterator[None]:
        """Give the modules outside of the blocks, but for the head, their own tensors when they
        are first called, until the end of the with statement."""
        inner = {module for block in self._blocks for module in block.modules()}
        inner.add(self._model.get_output_embeddings())
        filled: list[nn.Module] = []

        def fill(module: nn.Module, given: object) -> None:
            if module not in filled:
                filled.append(module)
                self._check(module, recurse=False)
                self._fill(module, recurse=False)

        hooks = [module.register_forward_pre_hook(fill) for module in self._names
                 if module not in inner]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in filled:
                empty(module, recurse=False)

    def _fill(self, module: nn.Module, *, recurse: bool = True) -> None:
        """Read the module's tensors."""
        prefix = self._names[module]
        fill(module, lambda name: self._read(f"{prefix}.{name}".lstrip(".")), self._device,
             self._dtype, recurse=recurse)

    def _check(self, module: nn.Module, *, recurse: bool = True) -> None:
        """Raise Unsuited where the checkpoint has not the module's tensors by their names."""
        for part, tensor in own_tensors(module, recurse=recurse):
            name = f"{self._names[module]}.{part}".lstrip(".")
            if self._shapes.get(name) != tuple(tensor.shape):
                raise Unsuited(f"{name} is not in its checkpoint, or of another shape")

    # --- the blocks ------------------------------------------------------------------------------

    def grams(self, leaders: Collection[str], *, executor: Executor, threads: int,
              max_bytes: int) -> Iterator[dict[str, Tensor]]:
        """X Xᵀ `[in, in]` fp32 of the layers in `leaders`, those of a block or of a part of one at
        a time, in the blocks' order. Can be run through once. Experts in `few_tokens` have one of
        all tokens of their layer, in common.

        Args:
            leaders: keys of `groups`; blocks after the last one that is asked for are not run.
            executor: runs the chunks.
            threads: chunks at a time at most.
            max_bytes: of the Gram matrices in the making, unless one alone takes more.

        Raises:
            NonFiniteError: an activation is NaN or Inf; the sentence names the layer.
        """
        outside = [name for name in self._outside if name in leaders]
        wanted = [[name for name in group if name in leaders] for group in self._groups]
        experts = ExpertGrams({name: self._linears[name] for name in leaders}, self.few_tokens,
                              self._share)
        last = max((index for index, names in enumerate(wanted) if names or outside), default=-1)
        for index, block in enumerate(self._blocks[: last + 1]):
            self._fill(block)
            *earlier, final = self._runs(wanted[index], max_bytes)
            for run in earlier:
                found, seen = self._run_block(index, block, run, executor, threads, max_bytes,
                                              keep=False)
                if found := experts.settle(run, found, seen):
                    yield found
            found, seen = self._run_block(index, block, final, executor, threads, max_bytes,
                                          keep=True)
            empty(block)
            if found := experts.settle(final, found, seen):
                yield found
        for run in self._runs(outside, max_bytes) if outside else []:
            modules = {name: self._linears[name] for name in run}
            with self._filled_when_called():  # one chunk at a time: stand-ins are the model's
                found = gram_matrices(self._leave, range(len(self._chunks)), modules,
                                      executor=executor, ahead=1, share=self._share,
                                      in_place=self._in_place)
            yield found

    def _runs(self, names: list[str], max_bytes: int) -> list[list[str]]:
        """Layers whose Gram matrices are made at a time: of each some sums, and a chunk's part
        where that is not added in place."""
        widths = {name: in_features(self._linears[name]) for name in names}
        return list(passes(widths, max_bytes // (self._share.at_once + (not self._in_place)))
                    ) or [[]]

    def _run_block(self, index: int, block: nn.Module, names: list[str], executor: Executor,
                   threads: int, max_bytes: int, *, keep: bool
                   ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """One block over all chunks: Gram matrices, and of how many tokens. With `keep` its outputs
        take the place of its inputs."""
        def forward(number: int) -> None:
            hidden, call = self._states[number], self._calls[number][index]
            output = call.on(block, hidden if keep else hidden.clone())
            if keep:
                self._states[number] = output

        layers, seen = {name: self._linears[name] for name in names}, {}
        size = sum(4 * in_features(layer) ** 2 for layer in layers.values())
        room = max_bytes // size - self._share.at_once if size else threads
        return gram_matrices(forward, range(len(self._chunks)), layers, executor=executor,
                             ahead=1 if self._in_place else max(1, min(threads, room)), seen=seen,
                             share=self._share, in_place=self._in_place), seen

    def _leave(self, number: int) -> None:
        """Run what follows the blocks for one chunk."""
        last = len(self._blocks) - 1
        self._run_outside(self._chunks[number], lambda index, hidden, call: (
            self._states[number] if index == last else hidden))


def _find_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Name and modules of the largest list of modules that is in no other, in the decoder."""
    decoder = set(getattr(model, "get_decoder", lambda: model)().modules())
    lists = [(name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) and module in decoder]
    outer = [(name, module) for name, module in lists
             if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise Unsuited("it has no list of blocks")
    name, found = max(outer, key=lambda one: sum(p.numel() for p in one[1].parameters()))
    blocks = list(found)
    parameters = [id(parameter) for block in blocks for parameter in block.parameters()]
    inside = {id(parameter) for parameter in found.parameters()}
    everywhere = [id(parameter) for _, parameter in
                  model.named_parameters(remove_duplicate=False) if id(parameter) in inside]
    if len(set(parameters)) != len(everywhere) or len(set(blocks)) != len(found):
        raise Unsuited("its blocks share weights")
    if getattr(model.config, "quantization_config", None) is not None:
        raise Unsuited("its weights are quantized")
    return name, blocks


def _tensors(call: _Call) -> list[Tensor]:
    found: list[Tensor] = []
    call.map(lambda tensor: (found.append(tensor), tensor)[1])
    return found
