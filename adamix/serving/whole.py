"""Parameters that are kept whole and differ by row: of routers, small linear layers, positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adamix.serving.routing import Routing


@dataclass
class ChangesSite:
    """A module with a weight `[out, in]`, and what each slot adds to it."""

    module: nn.Module
    changes: dict[str, Tensor]  # "weight" -> [slots + 1, out * in], "bias" -> [.., out]; fp32
    routing: Routing

    def __post_init__(self) -> None:
        for tensor in self.changes.values():
            torch._dynamo.mark_static_address(tensor)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y `[.., out]` and what each row's change makes of x `[.., in]`."""
        rows = x.reshape(-1, x.shape[-1]).float()
        weights = self.changes["weight"].unflatten(1, (-1, x.shape[-1]))
        slots = self.routing.of(len(rows)).long()
        of_all = torch.einsum("ti,soi->tso", rows, weights)
        change = of_all[torch.arange(len(rows), device=slots.device), slots]
        if "bias" in self.changes:
            change = change + self.changes["bias"][slots]
        return (y.float() + change.view(y.shape)).to(y.dtype)


class RoutedMap(nn.Module):
    """Stands before the class of a module that is one linear map of its own, as routers of experts
    are: kept whole, and needed exactly, for a token goes to an expert or does not.

    All fine-tunes' changes of it are multiplied with all rows, of which each keeps its own.
    """

    adamix_site: ChangesSite

    def forward(self, *inputs: Tensor, **named: Tensor) -> object:
        if isinstance(self, nn.Linear):
            x = inputs[0] if inputs else named["input"]
            return self.adamix_site.add(super().forward(x), x)
        with _Adding(self, self.adamix_site):
            return super().forward(*inputs, **named)


class RoutedPositions(nn.Module):
    """Stands before the class of an embedding of positions. Where it is asked for one row of them
    it gives back one for each routed row."""

    adamix_site: ChangesSite

    def forward(self, positions: Tensor) -> Tensor:
        routing, y = self.adamix_site.routing, super().forward(positions)
        weights = self.adamix_site.changes["weight"].unflatten(1, (-1, y.shape[-1]))
        if routing.by_token:
            slots = routing.of(positions.numel()).view(positions.shape)
        else:
            rows = routing.rows if len(positions) == 1 else len(positions)
            slots = routing.of(rows)[:, None]
            positions = positions.expand(rows, -1)
        return (y.float() + weights[slots.long(), positions]).to(y.dtype)


class _Adding(TorchFunctionMode):
    """Adds each row's change to what `F.linear` makes of a module's weight, in the block."""

    def __init__(self, module: nn.Module, site: ChangesSite) -> None:
        super().__init__()
        self._weight, self._site = module.weight, site
        self.calls = 0

    def __torch_function__(self, function: object, types: object, args: Sequence[object] = (),
                           kwargs: dict[str, object] | None = None) -> object:
        y = function(*args, **(kwargs or {}))
        if function is not F.linear or args[1] is not self._weight:
            return y
        self.calls += 1
        return self._site.add(y, args[0])


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
    routing = Routing(weight.device, 2)
    routing.write([0, 1])
    adding = _Adding(module, ChangesSite(module, changes, routing))
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
