"""A layer's experts and their router, each token by its row's fine-tune.

To an expert's matrices a fine-tune's delta is one slot of many: expert e of the fine-tune in slot s
is slot e · capacity + s of a table that all experts of the layer share, so one call of delta_gemm
does them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adamix import ops
from adamix.experts import activate, expert_parameters, finish, project
from adamix.serving.routing import Routing


@dataclass(frozen=True)
class ExpertBlock:
    """Outputs of all experts of a layer, whose deltas have names of their own: of the gate, say."""

    parameter: str
    begin: int  # of the parameter's outputs
    end: int
    names: list[str]  # of each expert's delta


@dataclass
class BlockTable:
    """Where the bank keeps the deltas of a block's experts."""

    block: ExpertBlock
    table: Tensor  # int64 [experts * slots, TABLE_COLUMNS]
    max_rank: int


@dataclass
class ExpertsSite:
    """An experts module, and where the bank keeps its deltas."""

    module: nn.Module
    blocks: list[BlockTable]
    arena: Tensor  # int32 [words], shared by all
    slots: int  # fine-tunes on the device at most
    routing: Routing

    def __post_init__(self) -> None:
        for tensor in (self.arena, *(block.table for block in self.blocks)):
            torch._dynamo.mark_static_address(tensor)

    def add(self, parameter: str, y: Tensor, x: Tensor, slots: Tensor) -> None:
        """Add the deltas of a parameter: y `[pairs, out]` += Δ̂ x `[pairs, in]`."""
        blocks = [block for block in self.blocks if block.block.parameter == parameter]
        if blocks and len(x):
            ops.delta_gemm_layers_(
                [y[:, block.block.begin : block.block.end] for block in blocks], x, self.arena,
                [block.table for block in blocks], slots,
                max_rank=max(block.max_rank for block in blocks))


class RoutedExperts(nn.Module):
    """Stands before the class of an experts module.

    Every pair of a token and one of its experts is a row. The base's products go expert by expert,
    each over its rows, and the experts in use are counted on the host: on a GPU that waits once a
    layer and cannot be captured in a CUDA graph, nor compiled whole. The deltas of all pairs are
    one call a parameter, up to eight parts of it.
    """

    adamix_site: ExpertsSite

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        site = self.adamix_site
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens, choices = len(x), top_k_index.shape[-1]
        first, second = expert_parameters(self)
        count = getattr(self, first).shape[0]
        experts = top_k_index.reshape(-1)
        order, runs = _by_expert(experts, count)
        slots = _pair_slots(site.routing.of(tokens), experts, choices, site.slots, count)
        x = x.repeat_interleave(choices, dim=0)
        for parameter in (first, second):
            y = _base_product(self, parameter, x, order, runs)
            site.add(parameter, y, x, slots)
            x = activate(self, y) if parameter == first else y
        weighted = finish(self, x) * top_k_weights.reshape(-1, 1)
        total = weighted.unflatten(0, (tokens, choices)).sum(dim=1)
        return total.to(hidden_states.dtype).view(hidden_states.shape)


def _by_expert(experts: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """The pairs in the order of their experts, and how many each expert has; what is no expert, as
    where other devices have it, comes first and last."""
    order = experts.argsort(stable=True)
    runs = torch.bincount(experts.clamp(-1, count) + 1, minlength=count + 2).tolist()
    return order, runs


def _base_product(module: nn.Module, parameter: str, x: Tensor, order: Tensor, runs: list[int]
                  ) -> Tensor:
    """Each pair's product with its expert's matrix of the base: `[pairs, out]`; 0 for no expert."""
    parts = x[order].split(runs)
    weight = getattr(module, parameter)
    out = weight.shape[2] if module.is_transposed else weight.shape[1]
    y = x.new_zeros(len(x), out)
    for expert, (part, pairs) in enumerate(zip(parts[1:-1], order.split(runs)[1:-1], strict=True)):
        if len(part):
            y[pairs] = project(module, parameter, expert, part)
    return y


def _pair_slots(slots: Tensor, experts: Tensor, choices: int, capacity: int, count: int) -> Tensor:
    """int32 `[pairs]`: slots of the table of all experts, -1 for the base and for no expert."""
    slots = slots.repeat_interleave(choices)
    known = (slots >= 0) & (slots < capacity) & (experts >= 0) & (experts < count)
    return torch.where(known, experts * capacity + slots, -1).to(torch.int32)


@torch.inference_mode()
def can_route_experts(module: nn.Module) -> bool:
    """Whether `RoutedExperts` computes what the module does, on a few random tokens."""
    first = getattr(module, expert_parameters(module)[0])
    hidden = first.shape[1] if module.is_transposed else first.shape[2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, hidden, generator=generator).to(first)
    choices = min(2, first.shape[0])
    scores = torch.rand(6, first.shape[0], generator=generator).to(first)
    weights, index = scores.topk(choices, dim=-1)
    routing = Routing(first.device)
    site = ExpertsSite(module, [], torch.zeros(1, dtype=torch.int32, device=first.device), 1,
                       routing)
    try:
        expected = module(x, index, weights)
        module.__dict__["adamix_site"] = site
        got = RoutedExperts.forward(module, x, index, weights)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    finally:
        module.__dict__.pop("adamix_site", None)
    rounding = 16 * torch.finfo(first.dtype).eps * expected.abs().max()
    return got.shape == expected.shape and bool((got - expected).abs().max() <= rounding)


@dataclass
class RouterSite:
    """A module that multiplies its input by one parameter, and what each slot adds to that."""

    module: nn.Module
    changes: dict[str, Tensor]  # "weight" -> [slots + 1, outputs * inputs], "bias" likewise; fp32
    routing: Routing

    def __post_init__(self) -> None:
        for tensor in self.changes.values():
            torch._dynamo.mark_static_address(tensor)


class RoutedRouter(nn.Module):
    """Stands before the class of a module that is one linear map of its own, as routers of experts
    are: small, kept whole, and needed exactly, for a token goes to an expert or does not.

    All fine-tunes' changes of it are multiplied with all rows, of which each keeps its own.
    """

    adamix_site: RouterSite

    def forward(self, *inputs: Tensor, **named: Tensor) -> object:
        with _Adding(self, self.adamix_site):
            return super().forward(*inputs, **named)


class _Adding(TorchFunctionMode):
    """Adds each row's change to what `F.linear` makes of a module's weight, in the block."""

    def __init__(self, module: nn.Module, site: RouterSite) -> None:
        super().__init__()
        self._weight, self._site = module.weight, site
        self.calls = 0

    def __torch_function__(self, function: object, types: object, args: Sequence[object] = (),
                           kwargs: dict[str, object] | None = None) -> object:
        y = function(*args, **(kwargs or {}))
        if function is not F.linear or args[1] is not self._weight:
            return y
        self.calls += 1
        return self._add(y, args[0])

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        changes, rows = self._site.changes, x.reshape(-1, x.shape[-1]).float()
        weights = changes["weight"].unflatten(1, (-1, x.shape[-1]))
        slots = self._site.routing.of(len(rows)).long()
        of_all = torch.einsum("ti,soi->tso", rows, weights)
        change = of_all[torch.arange(len(rows), device=slots.device), slots]
        if "bias" in changes:
            change = change + changes["bias"][slots]
        return (y.float() + change.view(y.shape)).to(y.dtype)


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module has a weight `[out, in]`, perhaps a bias, and nothing else."""
    own = dict(module.named_parameters())
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    return (not own and weight is not None and weight.dim() == 2 and weight.is_floating_point()
            and (bias is None or bias.shape == weight.shape[:1]))


@torch.inference_mode()
def can_route_linear_map(module: nn.Module) -> bool:
    """Whether a module with changes of each row's own gives what it does with theirs alone.

    Two rows with random changes are compared with each alone.
    """
    own = dict(module.named_parameters())
    weight, generator = own["weight"], torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[1], generator=generator).to(weight)
    changes = {name: 0.1 * torch.randn(3, parameter.numel(), generator=generator).to(weight.device)
               for name, parameter in own.items()}
    routing = Routing(weight.device)
    routing.write([0, 1])
    adding = _Adding(module, RouterSite(module, changes, routing))
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        alone = []
        for row in range(2):
            for name, parameter in own.items():
                change = changes[name][row].view(parameter.shape)
                parameter.data = (before[name].float() + change).to(parameter.dtype)
            alone.append(_tensors(module(x[row : row + 1])))
        for name, parameter in own.items():
            parameter.data = before[name]
        with adding:
            together = _tensors(module(x))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]
    rounding = 64 * torch.finfo(weight.dtype).eps
    pairs = [(got, torch.cat(both)) for got, *both in zip(together, *alone, strict=True)]
    return adding.calls == 1 and all(
        got.shape == want.shape and bool((got - want).abs().max() <= rounding * want.abs().max())
        for got, want in pairs if want.is_floating_point())


def _tensors(output: object) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [
        one for one in output if isinstance(one, Tensor)]
