"""One budget for all matrices of a model -> the bits of each (`allocate="model"`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adamix.artifacts import Hessian
from adamix.compression.matrix import component_bits
from adamix.compression.pairs import Pair

# What a component loses of its energy by its column of U at each width: the rounding error of
# Gaussian entries. By its row of V, where GPTQ makes up for a part, it loses half as much. Over the
# 37 matrices of a real fine-tune the shares that follow are within 3 % (at most 11 %) of those from
# simulated errors.
LOSSES = {8: 8.7e-5, 7: 3.0e-4, 6: 1.04e-3, 5: 3.5e-3, 4: 0.0115, 3: 0.0374, 2: 0.119, 1: 0.363}
V_LOSS = 0.5
SPREAD = 3  # times its even share that a matrix gets at most: bounds the memory that it takes
HALVINGS = 100


def energies(delta: Tensor, H: Hessian, row_weights: Tensor | None = None) -> Tensor:
    """The output energy of each component of ΔW, falling: eigenvalues of ΔW H ΔWᵀ.

    H has a mean diagonal of 1, so they are those of the outputs for inputs of mean square one, and
    those of different matrices can be added. Row weights are brought to a mean of 1 for the same.

    Args:
        delta: ΔW `[out, in]`.
        H: Hessian of the inputs.
        row_weights: cost of the squared error of each row `[out]`; None for ones.

    Returns:
        `[min(out, in)]` fp64, >= 0.
    """
    delta = delta.double()
    if row_weights is not None:
        weights = row_weights.double() / row_weights.double().mean()
        delta = delta * weights.sqrt()[:, None]
    if delta.shape[0] <= delta.shape[1]:
        square = delta @ H.matrix @ delta.T
    else:
        whitened = delta @ H.lower
        square = whitened.T @ whitened
    return torch.linalg.eigvalsh(square).flip(0).clamp_min(0.0)


def share_out(spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]],
              even: Mapping[str, int], pairs: Sequence[Pair]) -> dict[str, int]:
    """Spend the bits where they lower the summed output error most.

    One price λ for a bit in the whole model: every component takes the widths with the least
    predicted error + λ cost, and λ is the least one at which all keep to the budget (the Lagrangian
    relaxation of one integer program for all matrices). The programs of the matrices, each with
    what its components take here, are then solved on simulated errors as ever.

    Args:
        spectra: `energies` of each matrix.
        shapes: (out, in) of each.
        even: what each would get without this; together they bound the sum.
        pairs: (bits of V, bits of U) that a component may get besides 0.

    Returns:
        Bits of each matrix: at least one component, at most SPREAD times `even`, and in all one
        step of width a matrix less than `even`, so that no larger file comes of it.
    """
    tables = {name: _Table(spectra[name], shapes[name], even[name], pairs) for name in spectra}
    total = sum(even[name] - table.step for name, table in tables.items())
    low, high = 0.0, max((float(values[0]) for values in spectra.values() if len(values)),
                         default=0.0)
    for _ in range(HALVINGS):  # from a price at which nothing is worth a bit
        price = 0.5 * (low + high)
        if sum(table.spent(price) for table in tables.values()) > total:
            low = price
        else:
            high = price
    return {name: table.spent(high) for name, table in tables.items()}


class _Table:
    """The predicted errors of one matrix's components at each pair of widths."""

    def __init__(self, values: Tensor, shape: tuple[int, int], even: int, pairs: Sequence[Pair]
                 ) -> None:
        self.step = component_bits(shape, 2) - component_bits(shape, 1)
        self._least, self._most = min(component_bits(shape, *p) for p in pairs), SPREAD * even
        self._costs = torch.tensor([*(component_bits(shape, *pair) for pair in pairs), 0])
        losses = torch.tensor([*(V_LOSS * LOSSES[v] + LOSSES[u] for v, u in pairs), 1.0],
                              dtype=torch.float64)
        self._errors = values[:, None] * losses

    def spent(self, price: float) -> int:
        """Bits of all components at a price for each bit."""
        chosen = (self._errors + price * self._costs).argmin(dim=1)
        return min(max(int(self._costs[chosen].sum()), self._least), self._most)
