"""Layers that add to the base's output what each row's fine-tune changes.

A layer keeps its place, parameters and names: only its class becomes a subclass of what it was,
as torch's parametrizations do, so checkpoints are saved and loaded as before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adamix import ops
from adamix.serving.routing import Routing

SITE = "adamix_site"  # the attribute of a routed layer


@dataclass
class MatrixSite:
    """A linear layer or an embedding, and where the bank keeps its deltas."""

    module: nn.Module
    shape: tuple[int, int]  # (out, in) of the weight as a delta has it
    arena: Tensor  # int32 [words], shared by all
    table: Tensor  # int64 [slots, TABLE_COLUMNS]
    max_rank: int
    routing: Routing
    scale: float = 1.0  # an embedding's, on its rows

    def __post_init__(self) -> None:
        _stay(self.arena, self.table)


@dataclass
class ValuesSite:
    """A module with parameters of one dimension, a norm say, and the values of every slot."""

    module: nn.Module
    values: dict[str, Tensor]  # parameter -> [slots + 1, n], the base's last
    routing: Routing
    token_dim: int = 1
    table: Tensor | None = None  # what the values are columns of
    begins: dict[str, int] = field(default_factory=dict)  # parameter -> its first column there
    gathered: dict[str, Tensor] = field(default_factory=dict)  # while the module runs

    def __post_init__(self) -> None:
        _stay(self.table, *self.values.values())

    def rows(self, x: Tensor) -> dict[str, Tensor]:
        """Each row's own, shaped to broadcast over the input `x`."""
        return {name: self.routing.gather(values, x, self.token_dim, self.table,
                                          self.begins.get(name, 0))
                for name, values in self.values.items()}


def _stay(*tensors: Tensor | None) -> None:
    """Tell torch.compile that these keep their addresses: its CUDA graphs need no copies."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_static_address(tensor)


class Group:
    """Linear layers on one input, q, k and v say: whichever is called first computes all.

    Args:
        sites: the layers'.
        biases: fp32 `[slots, sum of bias_sizes]`, the fine-tune's less the base's.
        bias_sizes: of each layer; 0 where it has none.
    """

    def __init__(self, sites: list[MatrixSite], biases: Tensor | None, bias_sizes: list[int]
                 ) -> None:
        self.sites = sites
        self.biases, self.bias_sizes = biases, bias_sizes
        _stay(biases)
        # The input and the outputs that wait, in one attribute: threads cannot mix them up.
        self._ready: tuple[Tensor, dict[int, Tensor]] | None = None

    def output(self, index: int, x: Tensor) -> Tensor:
        """Output of the layer `index`; the others' wait for calls with the same tensor."""
        if len(self.sites) == 1:
            return self._compute(x)[0]
        ready = self._ready
        if ready is None or ready[0] is not x or index not in ready[1]:
            ready = (x, dict(enumerate(self._compute(x))))
        y = ready[1].pop(index)
        self._ready = ready if ready[1] else None
        return y

    def _compute(self, x: Tensor) -> list[Tensor]:
        sites = self.sites
        ys = [site.module.base_forward(x) for site in sites]
        if x.numel() == 0:
            return ys
        first = sites[0]
        x = x.to(ys[0].dtype)  # another under autocast
        slots = first.routing.of(x.numel() // x.shape[-1])
        max_rank = max(site.max_rank for site in sites)
        if len(sites) == 1:
            ops.delta_gemm_(ys[0], x, first.arena, first.table, slots, max_rank=max_rank)
        else:
            tables = [site.table for site in sites]
            ops.delta_gemm_layers_(ys, x, first.arena, tables, slots, max_rank=max_rank)
        if self.biases is not None:
            biased = [y for y, size in zip(ys, self.bias_sizes, strict=True) if size > 0]
            ops.add_rows_(biased, self.biases, slots)
        return ys


class RoutedLinear(nn.Module):
    """Stands before a linear layer's own class. Its site holds `(group, index)`."""

    adamix_site: tuple[Group, int]

    def base_forward(self, x: Tensor) -> Tensor:
        """The base's output."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        group, index = self.adamix_site
        return group.output(index, x)


class RoutedEmbedding(nn.Module):
    """Stands before an embedding's own class."""

    adamix_site: MatrixSite

    def base_forward(self, tokens: Tensor) -> Tensor:
        """The base's rows."""
        return super().forward(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        site = self.adamix_site
        y = super().forward(tokens)
        if tokens.numel() == 0:
            return y
        slots = site.routing.of(tokens.numel())
        if site.scale == 1.0:
            ops.delta_embedding_(y, tokens, site.arena, site.table, slots,
                                 vocab_size=site.shape[0], max_rank=site.max_rank)
            return y
        delta = torch.zeros_like(y)
        ops.delta_embedding_(delta, tokens, site.arena, site.table, slots,
                             vocab_size=site.shape[0], max_rank=site.max_rank)
        return y + delta * site.scale


class RoutedValues(nn.Module):
    """Stands before the class of a module whose parameters broadcast over its input's rows."""

    adamix_site: ValuesSite

    def forward(self, x: Tensor) -> Tensor:
        site = self.adamix_site
        site.gathered.update(site.rows(x))
        y = super().forward(x)
        site.gathered.clear()
        return y


class RoutedNorm(nn.Module):
    """Stands before nn.LayerNorm and nn.RMSNorm, whose functions take one weight for all rows."""

    adamix_site: ValuesSite

    def forward(self, x: Tensor) -> Tensor:
        site = self.adamix_site
        rows = {name: values.float() for name, values in site.rows(x).items()}
        if isinstance(self, nn.LayerNorm):
            y = F.layer_norm(x.float(), self.normalized_shape, eps=self.eps)
        else:
            y = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        if "weight" in rows:
            y = y * rows["weight"]
        if "bias" in rows:
            y = y + rows["bias"]
        return y.to(x.dtype)


def _gathered_or_own(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        gathered = self.__dict__[SITE].gathered if SITE in self.__dict__ else {}
        return gathered[name] if name in gathered else self._parameters[name]

    return property(read)


def install(module: nn.Module, mixin: type[nn.Module], site: object) -> None:
    """Give a layer its site and the class that uses it."""
    own = type(module)
    extra: dict[str, object] = {}
    if mixin is RoutedValues:
        assert isinstance(site, ValuesSite)
        extra = {name: _gathered_or_own(name) for name in site.values}
    # As nn.utils.parametrize does: a name that says what it was, found where its parent is.
    module.__class__ = type(own.__name__, (mixin, own), extra | {"__module__": own.__module__})
    module.__dict__[SITE] = site


def uninstall(module: nn.Module) -> None:
    """Give a layer back the class that it had."""
    module.__class__ = type(module).__mro__[2]
    del module.__dict__[SITE]


def routing_of(model: nn.Module) -> Routing | None:
    """What routes a model's layers; None where it has no bank."""
    for module in model.modules():
        site = module.__dict__.get(SITE)
        if site is not None:
            return (site[0].sites[0] if isinstance(site, tuple) else site).routing
    return None


def mixin_for_values(module: nn.Module) -> type[nn.Module]:
    """What routes the values of a module of this class."""
    return RoutedNorm if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else RoutedValues


@torch.inference_mode()
def can_differ_by_row(module: nn.Module) -> bool:
    """Whether a module computes with values of each row's own what it would with theirs alone.

    So for norms, as good as all of which multiply by their weight; not for layers that use their
    parameters otherwise. Two rows with random values are compared with each alone.
    """
    own = dict(module.named_parameters(recurse=False))
    lengths = {parameter.numel() for parameter in own.values()}
    if len(lengths) != 1:
        return False
    first = next(iter(own.values()))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(first)

    x = random(2, 3, lengths.pop())
    values = {name: random(3, parameter.numel()) for name, parameter in own.items()}
    routing = Routing(first.device, 2)
    routing.write([0, 1])
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        alone = []
        for row in range(2):
            for name, parameter in own.items():
                parameter.data = values[name][row]
            alone.append(module(x[row : row + 1]))
        install(module, mixin_for_values(module), ValuesSite(module, values, routing))
        together = module(x)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        if SITE in module.__dict__:
            uninstall(module)
        for name, parameter in own.items():
            parameter.data = before[name]
    expected = torch.cat(alone)
    rounding = 4 * torch.finfo(first.dtype).eps * expected.abs().max()
    return together.shape == expected.shape and bool((together - expected).abs().max() <= rounding)
