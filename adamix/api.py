"""attach: many fine-tunes on one model in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adamix.artifacts import ModelDelta
from adamix.errors import AdamixError, BankError, CheckpointError, FingerprintError
from adamix.experts import expert_parameters, expert_shape
from adamix.serving.bank import DeltaBank
from adamix.serving.experts import BlockTable, ExpertBlock, ExpertsSite, RoutedExperts
from adamix.serving.image import MatrixPlace, Places, ValuesPlace, words_of
from adamix.serving.memory import Memory
from adamix.serving.modules import (
    SITE,
    Group,
    MatrixSite,
    RoutedEmbedding,
    RoutedLinear,
    ValuesSite,
    can_differ_by_row,
    install,
    mixin_for_values,
    uninstall,
)
from adamix.serving.routing import Routing
from adamix.serving.sites import Plan, find_sites
from adamix.serving.whole import ChangesSite, RoutedMap, RoutedPositions
from adamix.source.checkpoints import Checkpoint, fingerprint_of
from adamix.source.parts import expert_names, find_parts
from adamix.storage.file import read_delta

SLOTS = 8
LEAST_RATIO = 15  # room for deltas of 1/16 and what aligning and tables add
LEAST_BITS = 2  # a component's, both factors: what bounds how many 1 bit a weight can pay for
MOST_SLOTS = 1024
VERIFY = {"sampled": "sampled", "full": "sha256", None: ""}  # keys of a fingerprint


def attach(model: nn.Module, deltas: Mapping[str, str | Path | ModelDelta] | None = None, *,
           slots: int | None = None, capacity_bytes: int | None = None,
           max_rank: int | None = None, host_bytes: int | None = None,
           base: str | Path | None = None, verify: str | None = "sampled") -> DeltaBank:
    """Let every row of a model's batches be answered by a fine-tune of its own.

    Its layers stay where they are and add to the base's output what the row's fine-tune changes.
    All memory that this takes on the device is allocated here.

    Args:
        model: of transformers, or of linear layers, embeddings and norms otherwise; on one device,
            in fp32, bf16 or fp16; for inference.
        deltas: fine-tunes to load at once by name; there is room for them unless the next three
            say otherwise.
        slots: fine-tunes on the device at a time, at most. Default: 8, or as many as
            `capacity_bytes` can hold at 1/32 of the model each, or as many as `deltas`.
        capacity_bytes: for their words. Default: 1/15 of the 16-bit model a slot, or what `deltas`
            take.
        max_rank: most components of a matrix. Default, for each matrix: as many as 1 bit a weight
            pays for at 2 bits, or as any of `deltas` has.
        host_bytes: what the host may hold of the fine-tunes that were read; default: all of them.
        base: the checkpoint that the model was loaded from; default: what the model says.
        verify: "sampled" compares 64 KiB of each of the base's tensors with what each delta was
            made from, "full" every byte, None nothing.

    Raises:
        BankError: the model is attached already, lies on several devices, has no place for a
            delta, or nobody can tell what it was loaded from; `deltas` do not fit.
        DeltaFileError, FingerprintError: one of them is damaged, or of another base.
        ValueError: an argument out of its range.
    """
    _check_arguments(model, slots, capacity_bytes, max_rank, verify)
    check = base_check(base or getattr(model, "name_or_path", ""), verify)
    plan = find_sites(model)
    if not plan.matrices:
        raise BankError(f"{type(model).__name__} has no linear layer: deltas have no place in it")
    first = {name: delta if isinstance(delta, ModelDelta) else read_delta(Path(delta))
             for name, delta in (deltas or {}).items()}
    blocks, aliases = _names(model, plan)
    places = _places(plan, blocks, aliases, max_rank, first.values())
    slots, capacity_bytes = _sizes(places, slots, capacity_bytes, first.values())
    device = plan.matrices[0].modules[0].weight.device
    routing, memory = Routing(device, slots), Memory(places, slots, capacity_bytes, device)
    installed = _install(plan, blocks, places, routing, memory)
    hooks = (model.register_forward_pre_hook(routing.begin_pass),
             model.register_forward_hook(routing.end_pass, always_call=True))
    detach = partial(_detach, installed, hooks)
    bank = DeltaBank(places, routing, memory, slots=slots, host_bytes=host_bytes, read=read_delta,
                     check=check, detach=detach)
    try:
        for name, delta in (deltas or {}).items():
            folder = None if isinstance(delta, ModelDelta) else Path(delta)
            bank.load(name, first[name], source=folder)
    except AdamixError:
        detach()
        raise
    return bank


def _detach(installed: list[nn.Module], hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    while installed:
        uninstall(installed.pop())


def _check_arguments(model: nn.Module, slots: int | None, capacity_bytes: int | None,
                     max_rank: int | None, verify: str | None) -> None:
    for name, value in (("slots", slots), ("capacity_bytes", capacity_bytes),
                        ("max_rank", max_rank)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if verify not in VERIFY:
        raise ValueError(f"verify must be one of {list(VERIFY)}, got {verify!r}")
    if any(SITE in module.__dict__ for module in model.modules()):
        raise BankError("the model has a bank already: detach it first")


def base_check(source: str | Path, verify: str | None) -> Callable[[ModelDelta, str], None]:
    """A function that raises FingerprintError for a delta of another base than `source`.

    Args:
        source: the checkpoint that the model was loaded from; read when first needed.
        verify: "sampled", "full" or None, as for `attach`.

    Raises:
        BankError: `source` cannot be read.
    """
    if verify is None:
        return lambda delta, name: None
    try:
        checkpoint = Checkpoint(source)
    except CheckpointError as error:
        raise BankError(f"what the model was loaded from cannot be read, so no delta can be "
                        f"compared with it ({error}): pass base=FOLDER, or verify=None") from error
    fingerprint = cache(lambda: fingerprint_of(checkpoint, full=verify == "full")[VERIFY[verify]])

    def check(delta: ModelDelta, name: str) -> None:
        ours, theirs = fingerprint(), delta.manifest.fingerprint[VERIFY[verify]]
        if ours != theirs:
            raise FingerprintError(f"{name} was made from another base: its tensors hash to "
                                   f"{theirs[:16]}…, this model's to {ours[:16]}…")

    return check


def _sizes(places: Places, slots: int | None, capacity_bytes: int | None,
           deltas: Collection[ModelDelta]) -> tuple[int, int]:
    """Slots and bytes, where one is given from it, else for the deltas, else the default."""
    model_bytes = sum(2 * out * n for out, n in (place.shape for place in places.matrices.values()))
    if slots is None and capacity_bytes is not None and not deltas:
        slots = min(max(32 * capacity_bytes // model_bytes, 1), MOST_SLOTS)
    slots = slots or len(deltas) or SLOTS
    if capacity_bytes is None:
        each = -(-model_bytes // LEAST_RATIO)
        known = [4 * words_of(delta) for delta in deltas]
        capacity_bytes = sum(known) + max(slots - len(known), 0) * max([*known, each])
    return slots, capacity_bytes


def _names(model: nn.Module, plan: Plan) -> tuple[dict[str, list[ExpertBlock]], dict[str, str]]:
    """How deltas, which have a checkpoint's names, call what is in the model.

    Returns:
        {experts module: what of it has deltas of its own}, and {name in a checkpoint: in the model}
        of other parameters, where they differ: a checkpoint of the base model alone leaves out what
        stands before all names.
    """
    parts = find_parts(model)
    blocks = {name: [ExpertBlock(parameter, begin, end, names)
                     for parameter in expert_parameters(module)
                     for begin, end, names in expert_names(model, parts, f"{name}.{parameter}")]
              for name, module in plan.experts.items()}
    whole = {name: part.parameter for name, part in parts.items() if part.expert is None}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    short = {name.removeprefix(prefix): own for name, own in whole.items()}
    return blocks, {name: own for name, own in (short | whole).items() if name != own}


def _places(plan: Plan, blocks: dict[str, list[ExpertBlock]], aliases: dict[str, str],
            max_rank: int | None, deltas: Iterable[ModelDelta]) -> Places:
    ranks: dict[str, int] = {}
    for delta in deltas:
        for name, packed in delta.matrices.items():
            name = aliases.get(name, name)
            ranks[name] = max(ranks.get(name, 0), packed.rank)
    shapes = {matrix.name: matrix.shape for matrix in plan.matrices}
    for name, of_module in blocks.items():  # a block's experts side by side: one table has them all
        for block in of_module:
            inputs = expert_shape(plan.experts[name], block.parameter)[1]
            shapes |= dict.fromkeys(block.names, (block.end - block.begin, inputs))
    matrices = {name: MatrixPlace(i, shape, most_components(shape, max_rank, ranks.get(name, 0)))
                for i, (name, shape) in enumerate(shapes.items())}
    values: dict[str, ValuesPlace] = {}
    columns: dict[torch.dtype, int] = {}

    def add(name: str, parameter: Tensor, dtype: torch.dtype, is_added: bool) -> None:
        begin = columns.get(dtype, 0)
        columns[dtype] = end = begin + parameter.numel()
        values[name] = ValuesPlace(begin, end, dtype, parameter.detach().float().cpu(), is_added)

    for module_name, module in plan.values.items():
        if not can_differ_by_row(module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            add(f"{module_name}.{name}", parameter, parameter.dtype, is_added=False)
    for module_name, module in (plan.routers | plan.positions).items():
        for name, parameter in module.named_parameters():
            add(f"{module_name}.{name}", parameter, torch.float32, is_added=True)
    names = _bias_names(plan)
    for group in plan.groups:  # those of a group side by side: they are gathered at once
        for module in group:
            if module.bias is not None:
                add(names[module], module.bias, torch.float32, is_added=True)
    return Places(matrices, values, columns, aliases)


def _bias_names(plan: Plan) -> dict[nn.Module, str]:
    return {module: f"{matrix.name.removesuffix('weight')}bias"
            for matrix in plan.matrices for module in matrix.modules}


def most_components(shape: tuple[int, int], limit: int | None, known: int = 0) -> int:
    """`limit`, or as many as 1 bit a weight pays for at 2 bits, or `known` if that is more."""
    out, n = shape
    default = max(out * n // ((out + n) * LEAST_BITS + 32), known, 1)
    return min(limit if limit is not None else default, out, n)


def _install(plan: Plan, blocks: dict[str, list[ExpertBlock]], places: Places, routing: Routing,
             memory: Memory) -> list[nn.Module]:
    """Give every layer its site; the layers, in order."""
    sites: dict[nn.Module, MatrixSite] = {}
    for matrix in plan.matrices:
        place = places.matrices[matrix.name]
        for module in matrix.modules:
            sites[module] = MatrixSite(
                module, place.shape, memory.arena.words, memory.tables[place.index],
                place.max_rank, routing, plan.scales.get(module, 1.0))
            if isinstance(module, nn.Embedding):
                install(module, RoutedEmbedding, sites[module])
    names = _bias_names(plan)
    for members in plan.groups:
        biases = [places.values[names[module]] for module in members if module.bias is not None]
        group = Group([sites[module] for module in members],
                      memory.columns(biases[0], biases[-1])[:-1] if biases else None,
                      [0 if module.bias is None else module.bias.numel() for module in members])
        for index, module in enumerate(members):
            install(module, RoutedLinear, (group, index))
    installed = list(sites)
    tables = memory.replacing(places)
    for module_name, module in plan.values.items():
        own = {name: places.values[f"{module_name}.{name}"]
               for name, _ in module.named_parameters(recurse=False)
               if f"{module_name}.{name}" in places.values}
        if own:
            values = {name: memory.columns(place) for name, place in own.items()}
            dtypes = {place.dtype for place in own.values()}
            table = tables[dtypes.pop()] if len(dtypes) == 1 else None
            site = ValuesSite(module, values, routing, plan.token_dims.get(module, 1), table,
                              {name: place.begin for name, place in own.items()})
            install(module, mixin_for_values(module), site)
            installed.append(module)
    return installed + _install_experts(plan, blocks, places, routing, memory)


def _install_experts(plan: Plan, blocks: dict[str, list[ExpertBlock]], places: Places,
                     routing: Routing, memory: Memory) -> list[nn.Module]:
    """Give experts, and what is kept whole, their sites; the modules, in order."""
    slots = memory.tables.shape[1]
    for name, module in plan.experts.items():
        tables = []
        for block in blocks[name]:
            of_experts = [places.matrices[delta] for delta in block.names]
            first, last = of_experts[0].index, of_experts[-1].index
            tables.append(BlockTable(block, memory.tables[first : last + 1].flatten(0, 1),
                                     max(place.max_rank for place in of_experts)))
        site = ExpertsSite(module, tables, memory.arena.words, slots, routing)
        install(module, RoutedExperts, site)
    for name, module in (plan.routers | plan.positions).items():
        changes = {own: memory.columns(places.values[f"{name}.{own}"])
                   for own, _ in module.named_parameters()}
        mixin = RoutedPositions if name in plan.positions else RoutedMap
        install(module, mixin, ChangesSite(module, changes, routing))
    return [*plan.experts.values(), *plan.routers.values(), *plan.positions.values()]
