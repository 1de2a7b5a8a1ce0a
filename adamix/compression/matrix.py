"""The method for one matrix, in the order of the paper's Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamix import ops
from adamix.artifacts import Factors, Hessian, Lanes, QuantizedDelta
from adamix.compression.allocate import allocate
from adamix.compression.correct import component_gains, component_gram, correct, solve_rows
from adamix.compression.decompose import decompose
from adamix.compression.pairs import Pair, columns, equal_pairs, sets_of_pairs, union
from adamix.compression.quantize import quantize_columns, quantize_rows
from adamix.compression.simulate import Simulation, simulate
from adamix.config import Config
from adamix.errors import BudgetError, NonFiniteError

SCALE_BITS = 32  # one fp32 scale a component


@dataclass(frozen=True)
class MatrixResult:
    """A quantized matrix with what its plan was chosen from."""

    delta: QuantizedDelta
    singular_values: Tensor  # [candidates] fp64
    errors: Tensor  # [candidates, widths + 1] fp64, of V and U at the same width each
    widths: tuple[int, ...]  # of the columns of `errors` before the last, which is 0 bits


def quantize_matrix(delta: Tensor, H: Hessian, config: Config, *, budget_bits: int | None = None,
                    row_weights: Tensor | None = None,
                    solve: Callable[..., Tensor] = allocate) -> MatrixResult:
    """ΔW -> Û_int · diag(scales) · V̂_int within the budget (paper Algorithm 1).

    Args:
        delta: ΔW `[out, in]`.
        H: Hessian of the inputs.
        config: which steps are on.
        budget_bits: for this matrix, scales counted; default: `config.budget_bits`.
        row_weights: cost of the squared error of each row `[out]`, > 0 (an embedding's token
            frequencies); None for ones.
        solve: `allocate`, or what calls it in another process.

    Raises:
        NonFiniteError: ΔW holds NaN or Inf.
        BudgetError: the budget does not pay for one component.
        ValueError: the shapes do not fit each other, or a row weight is not positive.
    """
    _check(delta, H, row_weights)
    delta = delta.double()
    weighted = delta if row_weights is None else delta * row_weights.double().sqrt()[:, None]
    budget = config.budget_bits(delta.shape) if budget_bits is None else budget_bits
    sets = sets_of_pairs(config)
    pairs = union(sets)
    costs = [component_bits(delta.shape, v, u) for v, u in pairs]
    if budget < min(costs):
        raise BudgetError(
            f"a budget of {budget} bits is too small for one component of a {delta.shape[0]} x "
            f"{delta.shape[1]} matrix, which takes {min(costs)} bits: ask for more bits a weight")

    factors = decompose(weighted, H, budget // min(costs), plain=config.decomposition == "plain",
                        damping=config.svd_damping)
    simulation = simulate(factors, H, config.bit_widths, include_u=config.objective == "v+u",
                          row_weights=row_weights)
    choice = solve(simulation.errors(pairs), [*costs, 0], budget, sets=columns(sets),
                   max_choices=config.max_widths, solver=config.solver)
    quantized = _quantize(delta, H, config, factors, simulation, _kept(pairs, choice), row_weights)
    return MatrixResult(quantized, factors.s, simulation.errors(equal_pairs(config.bit_widths)),
                        config.bit_widths)


def _quantize(delta: Tensor, H: Hessian, config: Config, factors: Factors, simulation: Simulation,
              kept: tuple[Tensor, Tensor, Tensor], row_weights: Tensor | None) -> QuantizedDelta:
    """The kept components at their widths: V, then U corrected for V's error, then both again; at
    last their scales."""
    components, v_bits, u_bits = (part.to(delta.device) for part in kept)
    if len(components) == 0:  # ΔW = 0, or nothing in it that these inputs can see
        empty = torch.empty(0, dtype=torch.uint8, device=delta.device)
        return QuantizedDelta(empty.view(0, delta.shape[0]), empty.view(0, delta.shape[1]), u_bits,
                              v_bits, torch.empty(0, device=delta.device))
    V_hat, s = simulation.rows_at(components, v_bits), factors.s[components]
    U = factors.U[:, components]
    if row_weights is not None:
        U = U / row_weights.double().sqrt()[:, None]  # back from D^½ U to the U that is stored

    def quantize_u() -> Lanes:
        A = s[:, None] * V_hat.dequantize()
        gram = component_gram(A, H)
        target = correct(delta, A, H, gram) if config.correction else U
        return quantize_columns(target, u_bits, gram, row_weights)

    U_hat = quantize_u()
    for _ in range(config.passes - 1):
        V_star = solve_rows(delta, U_hat.dequantize().T, row_weights)
        s = torch.linalg.vector_norm(V_star, dim=1)
        V_hat = quantize_rows(V_star / s[:, None], v_bits, H)
        U_hat = quantize_u()
    scales = U_hat.scales.double() * s * V_hat.scales.double()
    if config.unbiased:
        scaled = U_hat.dequantize().T * s
        if row_weights is not None:
            scaled = scaled * row_weights.double().sqrt()[:, None]
        whole = Factors(factors.U[:, components], factors.s[components], factors.V[components])
        scales *= component_gains(whole, scaled, V_hat.dequantize()) ** config.gain
    return QuantizedDelta(U_hat.codes, V_hat.codes, u_bits, v_bits, scales.float())


def _check(delta: Tensor, H: Hessian, row_weights: Tensor | None) -> None:
    n = H.matrix.shape[0]
    if delta.dim() != 2 or delta.shape[1] != n:
        raise ValueError(
            f"expected ΔW [out, {n}] for a Hessian [{n}, {n}], got {list(delta.shape)}")
    if not torch.isfinite(delta).all():
        raise NonFiniteError("the delta holds NaN or Inf")
    if row_weights is not None and (row_weights.shape != delta.shape[:1] or not
                                    (torch.isfinite(row_weights) & (row_weights > 0)).all()):
        raise ValueError(f"row_weights must be {delta.shape[0]} finite numbers above 0, got "
                         f"{list(row_weights.shape)} from {row_weights.min().item():g} on")


def component_bits(shape: tuple[int, int], v_bits: int, u_bits: int | None = None) -> int:
    """What one component of a matrix `[out, in]` takes in the file, in bits: its row of V at v_bits
    and its column of U at u_bits, the same where none are given, and its scale."""
    u_bits = v_bits if u_bits is None else u_bits
    return 32 * (ops.lane_words(shape[1], v_bits) + ops.lane_words(shape[0], u_bits)) + SCALE_BITS


def _kept(pairs: Sequence[Pair], choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Components that keep any bits, by widths descending, then by index; their widths in V; in U.
    """
    order = torch.sort(choice, stable=True).indices
    order = order[choice[order] < len(pairs)]
    bits = torch.tensor(pairs, dtype=torch.int32)[choice[order]]
    return order, bits[:, 0].contiguous(), bits[:, 1].contiguous()
