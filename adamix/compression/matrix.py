"""The method for one matrix, in the order of the paper's Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adamix import ops
from adamix.artifacts import Hessian, QuantizedDelta
from adamix.compression.allocate import allocate
from adamix.compression.correct import component_gram, correct, solve_rows
from adamix.compression.decompose import decompose
from adamix.compression.quantize import quantize_columns, quantize_rows
from adamix.compression.simulate import Simulation, simulate
from adamix.config import Config

SCALE_BITS = 32  # one fp32 scale a component


@dataclass(frozen=True)
class MatrixResult:
    """A quantized matrix with what its plan was chosen from."""

    delta: QuantizedDelta
    singular_values: Tensor  # [candidates] fp64
    errors: Tensor  # [candidates, widths + 1] fp64, as the allocation saw them
    widths: tuple[int, ...]  # of the columns of `errors`, the last of which is 0 bits


def quantize_matrix(delta: Tensor, H: Hessian, config: Config, *, budget_bits: int | None = None,
                    row_weights: Tensor | None = None) -> MatrixResult:
    """ΔW -> Û_int · diag(scales) · V̂_int within the budget (paper Algorithm 1, DESIGN below).

    Args:
        delta: ΔW `[out, in]`.
        H: Hessian of the inputs.
        config: which steps are on.
        budget_bits: for this matrix, scales counted; default: `config.budget_bits`.
        row_weights: cost of the squared error of each row `[out]`, > 0 (an embedding's token
            frequencies); None for ones.

    Raises:
        ValueError: ΔW is not finite, or the budget does not pay for one component.
    """
    if not torch.isfinite(delta).all():
        raise ValueError("the delta holds NaN or Inf")
    delta = delta.double()
    root = None if row_weights is None else row_weights.double().sqrt()[:, None]
    weighted = delta if root is None else delta * root
    budget = config.budget_bits(delta.shape) if budget_bits is None else budget_bits
    costs = [component_bits(delta.shape, b) for b in config.bit_widths]
    if budget < min(costs):
        raise ValueError(
            f"a budget of {budget} bits is too small for one component of a {delta.shape[0]} x "
            f"{delta.shape[1]} matrix, which takes {min(costs)} bits: ask for more bits a weight")

    factors = decompose(weighted, H, budget // min(costs), plain=config.decomposition == "plain")
    simulation = simulate(factors, H, config.bit_widths, include_u=config.objective == "v+u",
                          row_weights=row_weights)
    choice = allocate(simulation.errors, [*costs, 0], budget, max_choices=config.max_widths,
                      solver=config.solver)
    components, bits = _kept(simulation, choice)
    V_hat, s = simulation.rows_at(components, bits), factors.s[components]

    for turn in range(config.passes):
        if turn > 0:
            B = U_hat.dequantize().T
            V_star = solve_rows(delta, B, row_weights)
            s = torch.linalg.vector_norm(V_star, dim=1)
            V_hat = quantize_rows(V_star / s[:, None], bits, H)
        A = s[:, None] * V_hat.dequantize()
        gram = component_gram(A, H)
        if config.correction:
            U = correct(delta, A, H, gram)
        else:
            U = factors.U[:, components] if root is None else factors.U[:, components] / root
        U_hat = quantize_columns(U, bits, gram, row_weights)

    scales = U_hat.scales.double() * s * V_hat.scales.double()
    quantized = QuantizedDelta(U_hat.codes, V_hat.codes, bits, scales.float())
    return MatrixResult(quantized, factors.s, simulation.errors, config.bit_widths)


def component_bits(shape: tuple[int, int], bits: int) -> int:
    """What one component of a matrix `[out, in]` takes in the file at the given width, in bits."""
    return 32 * sum(ops.lane_words(n, bits) for n in shape) + SCALE_BITS


def _kept(simulation: Simulation, choice: Tensor) -> tuple[Tensor, Tensor]:
    """Components that keep any bits, by width descending, then by index; and their widths."""
    table = torch.tensor([*simulation.widths, 0], dtype=torch.int32)
    bits = table[choice]
    order = torch.sort(bits, descending=True, stable=True).indices
    order = order[bits[order] > 0]
    return order, bits[order]
