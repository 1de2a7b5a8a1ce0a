"""Where in a model deltas act, found from its modules and from one small forward pass.

The pass tells what names cannot: which linear layers get the same input (they make one call), in
which dimension an activation has its tokens, how an embedding scales its rows, and whether a
module's parameters can differ from row to row.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adamix.artifacts import SMALL
from adamix.errors import BankError
from adamix.experts import is_experts
from adamix.serving.experts import can_route_experts
from adamix.serving.whole import can_route_linear_map, is_linear_map

PROBE_ROWS = 2
PROBE_TOKENS = (13, 11, 17)  # the first that is no size of the model: found again in shapes
SCALE_ROWS = 16  # of an embedding, looked up to see how it scales them
LINEAR = (nn.Linear, Conv1D)
GROUP_MOST = 8  # matrices of one call of delta_gemm


@dataclass
class Matrix:
    """A weight that a low-rank delta can be added to."""

    name: str  # of the parameter; a tied head has the embedding's
    modules: list[nn.Module]  # one, or the embedding and the head tied to it
    shape: tuple[int, int]


@dataclass
class Plan:
    """What `find_sites` found."""

    matrices: list[Matrix] = field(default_factory=list)
    groups: list[list[nn.Module]] = field(default_factory=list)  # linear layers on one input
    values: dict[str, nn.Module] = field(default_factory=dict)  # module name -> module
    token_dims: dict[nn.Module, int] = field(default_factory=dict)
    scales: dict[nn.Module, float] = field(default_factory=dict)  # of embeddings, on their rows
    experts: dict[str, nn.Module] = field(default_factory=dict)  # module name -> module
    routers: dict[str, nn.Module] = field(default_factory=dict)  # linear maps that are kept whole
    positions: dict[str, nn.Module] = field(default_factory=dict)  # embeddings of positions


@dataclass
class _Call:
    module: nn.Module
    x: Tensor
    y: Tensor


def find_sites(model: nn.Module) -> Plan:
    """Every linear layer, embedding, norm, layer of experts and router of a model.

    Raises:
        BankError: its parameters are on several devices.
    """
    places = {parameter.device for parameter in model.parameters()}
    if len(places) != 1 or next(iter(places)).type == "meta":
        raise BankError(f"a model must be loaded, on one device, got {sorted(map(str, places))}")
    plan, calls = Plan(), _probe(model)
    inputs = {call.module: call.x for call in calls}
    by_weight: dict[nn.Parameter, Matrix] = {}
    for name, module in _routable(model):
        if isinstance(module, nn.Embedding):
            scale = _scale(module, inputs.get(module))
            if scale is None:
                if _is_of_positions(module, inputs.get(module)):
                    plan.positions[name] = module
                continue
            plan.scales[module] = scale
        small = isinstance(module, nn.Linear) and min(module.weight.shape) < SMALL
        if small and can_route_linear_map(module):
            plan.routers[name] = module
        elif isinstance(module, (*LINEAR, nn.Embedding)):
            matrix = Matrix(f"{name}.weight", [module], _shape(module))
            tied = by_weight.setdefault(module.weight, matrix)
            if tied is matrix:
                plan.matrices.append(matrix)
            else:
                tied.modules.append(module)
        elif is_experts(module):
            if can_route_experts(module):
                plan.experts[name] = module
        elif is_linear_map(module):
            if can_route_linear_map(module):
                plan.routers[name] = module
        elif _has_values(module):
            plan.values[name] = module
    known = {module for matrix in plan.matrices for module in matrix.modules}
    plan.groups = [group for members in _groups(calls, model)
                   if (group := [module for module in members if module in known])]
    for call in calls:
        plan.token_dims.setdefault(call.module, _token_dim(call.y, _probe_tokens(model)))
    return plan


def _routable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name; of a model of several kinds of input the language model's alone: what enters
    a vision tower has no rows of the batch."""
    config = getattr(model, "config", None)
    known = set(model.modules())
    if config is not None and config.get_text_config() is not config:
        layers = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
        known = {module for layer in layers if layer is not None for module in layer.modules()}
    return ((name, module) for name, module in model.named_modules() if module in known)


def _shape(module: nn.Linear | Conv1D | nn.Embedding) -> tuple[int, int]:
    """[out, in] as a delta has it, however the layer packs its weight."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.num_embeddings, module.embedding_dim


def _has_values(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.dim() == 1 and p.is_floating_point() for p in own)


def _probe(model: nn.Module) -> list[_Call]:
    """Calls of leaf modules in one forward pass of a few tokens; none where the model asks for
    other inputs."""
    calls: list[_Call] = []

    def record(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append(_Call(module, inputs[0], output))

    hooks = [module.register_forward_hook(record) for module in model.modules()
             if next(module.children(), None) is None]
    ids = torch.zeros(PROBE_ROWS, _probe_tokens(model), dtype=torch.long,
                      device=next(model.parameters()).device)
    try:
        with torch.inference_mode(), _evaluating(model):
            model(input_ids=ids, use_cache=False)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _probe_tokens(model: nn.Module) -> int:
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    config = getattr(model, "config", None)
    if config is not None:
        sizes |= {value for value in vars(config.get_text_config()).values()
                  if isinstance(value, int)}
    return next((count for count in PROBE_TOKENS if count not in sizes), PROBE_TOKENS[0])


def _token_dim(activation: Tensor, tokens: int) -> int:
    """The dimension that is the tokens; 1 where it cannot be told."""
    dims = [dim for dim in range(1, activation.dim() - 1) if activation.shape[dim] == tokens]
    return dims[0] if dims else 1


def _groups(calls: Iterable[_Call], model: nn.Module) -> list[list[nn.Module]]:
    """Linear layers of one parent module that were called once each, on one tensor; all others
    alone."""
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    linears = [call for call in calls if isinstance(call.module, LINEAR)]
    times = Counter(call.module for call in linears)
    shared: dict[tuple[int, nn.Module], list[nn.Module]] = {}
    for call in linears:
        if times[call.module] == 1:
            shared.setdefault((id(call.x), parents[call.module]), []).append(call.module)
    found = [group[first : first + GROUP_MOST] for group in shared.values()
             for first in range(0, len(group), GROUP_MOST)]
    grouped = {module for group in found for module in group}
    return found + [[module] for module in model.modules()
                    if isinstance(module, LINEAR) and module not in grouped]


@torch.inference_mode()
def _scale(module: nn.Embedding, tokens: Tensor | None) -> float | None:
    """What an embedding multiplies its rows with; None where it does something else with them, or
    looks up what is no row's own: positions."""
    if tokens is not None and (tokens.dim() != 2 or len(tokens) != PROBE_ROWS):
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    few = _first_rows(module, SCALE_ROWS)
    try:
        own = few(torch.arange(few.weight.shape[0])[None])[0].double()
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    plain = few.weight.double()
    if own.shape != plain.shape:
        return None
    scale = ((plain * own).sum() / plain.square().sum().clamp(min=1e-300)).item()
    rounding = 4 * torch.finfo(module.weight.dtype).eps
    agrees = (own - scale * plain).abs().max() <= rounding * own.abs().max()
    return scale if agrees else None


def _is_of_positions(module: nn.Embedding, tokens: Tensor | None) -> bool:
    """Whether an embedding looks up one row for each token's place, whatever the batch's rows."""
    return (type(module).forward is nn.Embedding.forward and tokens is not None
            and tokens.dim() == 2 and len(tokens) == 1)


def _first_rows(module: nn.Embedding, rows: int) -> nn.Embedding:
    """A copy of an embedding with the first rows of its table, on the CPU.

    A module that looks up other rows than it is asked for, as OPT's positions do, then raises an
    IndexError. On a GPU it would fail a device-side assertion, after which nothing runs there.
    """
    few = copy.copy(module)
    few._parameters = {name: None if tensor is None else nn.Parameter(
        (tensor.detach()[:rows] if tensor is module.weight else tensor.detach()).cpu(),
        requires_grad=False) for name, tensor in module._parameters.items()}
    few._buffers = {name: None if tensor is None else tensor.detach().cpu()
                    for name, tensor in module._buffers.items()}
    few.num_embeddings = few.weight.shape[0]
    if few.padding_idx is not None and few.padding_idx >= few.num_embeddings:
        few.padding_idx = None
    return few
