"""Factors, H -> the error of every component at every width, before any is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix import ops
from adamix.artifacts import Factors, Hessian, Lanes
from adamix.compression.quantize import nearest_codes, quantize_rows, search_scales

# Entries of U at a time. On the CPU all that is made of them then stays in a core's cache; on a GPU
# they are enough to keep it busy and few enough for its memory.
AT_A_TIME = {"cpu": 2**18, "cuda": 2**26}


@dataclass(frozen=True)
class Simulation:
    """What each width would cost, and the codes of V that it was measured on."""

    v_errors: Tensor  # [rank, widths] fp64: e_V
    u_errors: Tensor  # [rank, widths] fp64: e_U; zeros where the objective has no U
    whole: Tensor  # [rank] fp64: of the component left out
    widths: tuple[int, ...]
    rows: Lanes  # [widths · rank lanes]: all rows at the first width, then at the next

    def errors(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """e_V + e_U `[rank, pairs + 1]` at pairs (bits of V, bits of U); the last column is 0 bits,
        the component left out."""
        v, u = ([self.widths.index(pair[side]) for pair in pairs] for side in (0, 1))
        kept = self.v_errors[:, v] + self.u_errors[:, u]
        return torch.cat([kept, self.whole[:, None]], dim=1)

    def rows_at(self, components: Tensor, bits: Tensor) -> Lanes:
        """The simulated rows of V for the given components, each at the width given for it."""
        rank = self.whole.shape[0]
        position = torch.zeros(ops.MAX_BITS + 1, dtype=torch.long)
        position[list(self.widths)] = rank * torch.arange(len(self.widths))
        return self.rows.select(position.to(bits.device)[bits.long()] + components)


def simulate(factors: Factors, H: Hessian, widths: tuple[int, ...], *, include_u: bool = True,
             row_weights: Tensor | None = None) -> Simulation:
    """The output error of each component at each width of V (paper eq. 5) and of U.

    e_V[i, b] = s_i² ΔV_i H ΔV_iᵀ from a GPTQ run on all rows at all widths at once;
    e_U[i, b] = ρ_b s_i² V_i H V_iᵀ, ρ_b the share of its energy that column i of U loses when it is
    rounded at b bits. e_V at V's width and e_U at U's, summed over the components, predict the
    error of the quantized matrix to about 1 %.

    Args:
        factors: of D^½ ΔW where row weights D are given.
        H: Hessian of the inputs.
        widths: the widths to try, each 1..8.
        include_u: with e_U; without it the objective is the paper's.
        row_weights: D's diagonal `[out]`; None for ones.
    """
    rank = factors.s.shape[0]
    bits = _each(widths, rank, factors.V.device)
    rows = quantize_rows(factors.V.repeat(len(widths), 1), bits, H)
    power = factors.s**2
    lost = (factors.V - rows.select(slice(k * rank, (k + 1) * rank)).dequantize()
            for k in range(len(widths)))  # one width at a time: they are large
    v_errors = power[:, None] * torch.stack([_energy(part, H) for part in lost], dim=1)
    whole = power * _energy(factors.V, H)
    u_errors = torch.zeros_like(v_errors)
    if include_u:
        u_errors = whole[:, None] * _u_losses(factors.U, widths, row_weights)
    return Simulation(v_errors, u_errors, whole, widths, rows)


def _each(widths: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Every width, `count` times in turn."""
    return torch.tensor(widths, dtype=torch.int32, device=device).repeat_interleave(count)


def _energy(rows: Tensor, H: Hessian) -> Tensor:
    """v H vᵀ for each row v."""
    return ((rows @ H.matrix) * rows).sum(dim=1)


def _u_losses(U: Tensor, widths: tuple[int, ...], row_weights: Tensor | None) -> Tensor:
    """ρ `[rank, widths]`: lost share of each column's energy, with its own quantizer and scale."""
    weights = None if row_weights is None else row_weights.float()
    columns = U.T.float()
    if row_weights is not None:
        columns = columns / row_weights.sqrt().float()  # back from D^½ U to the U that is stored
    # All columns at all widths would be the largest array of a compression, by far.
    copies = len(widths) * columns.shape[1]
    rows = max(1, AT_A_TIME[columns.device.type] // max(copies, 1))
    return torch.cat([_lost_shares(part, widths, weights) for part in columns.split(rows)])


def _lost_shares(columns: Tensor, widths: tuple[int, ...], weights: Tensor | None) -> Tensor:
    count = columns.shape[0]
    bits = _each(widths, count, columns.device)
    columns = columns.repeat(len(widths), 1)
    scales = search_scales(columns, bits, weights)
    levels = 2.0 * nearest_codes(columns, bits, scales) - (2.0 ** bits.float() - 1.0)[:, None]
    lost, kept = (columns - scales[:, None] * levels).square(), columns.square()
    if weights is not None:
        lost, kept = lost * weights, kept * weights
    rho = lost.double().sum(dim=1) / kept.double().sum(dim=1)
    return rho.view(len(widths), count).T
