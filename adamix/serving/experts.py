"""A layer's experts, each token by its row's fine-tune.

To an expert's matrices a fine-tune's delta is one slot of many: expert e of the fine-tune in slot s
is slot e · capacity + s of a table that all experts of the layer share, so one call of delta_gemm
does them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    routing = Routing(first.device, 1)
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
