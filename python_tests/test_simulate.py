"""simulate: every entry of the table against explicit errors on the inputs themselves."""

import numpy as np
import pytest
import torch
from reference import (
    array,
    damped_inputs,
    gaussian_rounding_loss,
    layer_delta,
    layer_inputs,
    levels,
    orthonormal,
    output_error,
    rounding_error,
)

from adamix.artifacts import Factors
from adamix.compression.allocate import allocate
from adamix.compression.decompose import decompose
from adamix.compression.hessian import hessian, identity
from adamix.compression.matrix import quantize_matrix
from adamix.compression.pairs import equal_pairs
from adamix.compression.quantize import search_scales
from adamix.compression.simulate import simulate
from adamix.config import Config

DAMPING = 0.01


def case(out=40, n=48, rank=12, seed=0, row_weights=None):
    rng = np.random.default_rng(seed)
    X = layer_inputs(rng, n, 200)
    H = hessian(torch.from_numpy(X @ X.T), DAMPING)
    delta = torch.from_numpy(layer_delta(rng, out, n))
    if row_weights is not None:
        delta = delta * row_weights.sqrt()[:, None]
    return decompose(delta, H, rank), H, damped_inputs(X, DAMPING)


def energy_of_V(factors, X):
    return ((array(factors.s)[:, None] * array(factors.V) @ X) ** 2).sum(axis=1)


@pytest.mark.parametrize("include_u", [True, False])
def test_leaving_a_component_out_costs_its_output_energy(include_u):
    factors, H, X = case()
    errors = simulate(factors, H, (8, 3, 2), include_u=include_u).errors(equal_pairs((8, 3, 2)))
    assert errors.shape == (12, 4) and errors.dtype == torch.float64
    np.testing.assert_allclose(array(errors[:, 3]), energy_of_V(factors, X), rtol=1e-10)


def test_without_u_an_error_is_that_of_the_rounded_row_on_the_inputs():
    factors, H, X = case()
    widths = (5, 1, 8, 2)  # in no order: column k belongs to widths[k]
    simulation = simulate(factors, H, widths, include_u=False)
    for k, b in enumerate(widths):
        rows = simulation.rows_at(torch.arange(12), torch.full((12,), b, dtype=torch.int32))
        assert rows.bits.tolist() == [b] * 12
        V_hat = array(rows.scales)[:, None] * levels(b)[rows.codes.numpy()]
        lost = array(factors.s)[:, None] * (array(factors.V) - V_hat) @ X
        # fp64 throughout; the scale's fp32 value is exact here.
        np.testing.assert_allclose(array(simulation.v_errors[:, k]), (lost**2).sum(axis=1),
                                   rtol=1e-9)
    assert not simulation.u_errors.any()


def test_a_pairs_error_is_that_of_vs_width_and_of_us():
    factors, H, _ = case()
    simulation = simulate(factors, H, (8, 3, 2))
    errors = simulation.errors([(3, 8), (2, 2), (8, 3)])
    for column, (k, j) in enumerate([(1, 0), (2, 2), (0, 1)]):
        assert torch.equal(errors[:, column],
                           simulation.v_errors[:, k] + simulation.u_errors[:, j])
    assert torch.equal(errors[:, 3], simulation.whole) and errors.shape == (12, 4)


def test_rows_at_gives_each_component_its_own_width():
    factors, H, _ = case()
    simulation = simulate(factors, H, (8, 3, 2))
    mixed = simulation.rows_at(torch.tensor([7, 0, 3]), torch.tensor([8, 2, 3], dtype=torch.int32))
    for lane, (component, b) in enumerate([(7, 8), (0, 2), (3, 3)]):
        alone = simulation.rows_at(torch.tensor([component]), torch.tensor([b], dtype=torch.int32))
        assert torch.equal(mixed.codes[lane], alone.codes[0])
        assert mixed.scales[lane] == alone.scales[0] and mixed.bits[lane] == b
        V = array(factors.V[component])
        lost = V - array(mixed.scales)[lane] * levels(b)[mixed.codes[lane].numpy()]
        assert (lost**2).sum() < 0.3 * (V**2).sum()  # it is that component's row


def lost_shares(columns, b, weights=None):
    """ρ of each column at the product's own scale (its search is tested in test_quantize)."""
    bits = torch.full((columns.shape[0],), b, dtype=torch.int32)
    scales = search_scales(columns, bits, weights)
    D = np.ones(columns.shape[1]) if weights is None else array(weights)
    return np.array([rounding_error(column, scale, b, D) / (D @ array(column) ** 2)
                     for column, scale in zip(columns, scales.tolist(), strict=True)])


@pytest.mark.parametrize("weighted", [False, True])
def test_u_adds_the_share_that_the_stored_column_loses_of_the_output_energy(weighted):
    D = torch.from_numpy(np.random.default_rng(1).uniform(0.02, 1, 40)) if weighted else None
    factors, H, X = case(row_weights=D)
    widths = (6, 3, 2, 1)
    pairs = equal_pairs(widths)
    both = simulate(factors, H, widths, row_weights=D).errors(pairs)
    v_alone = simulate(factors, H, widths, include_u=False, row_weights=D).errors(pairs)
    stored = factors.U if D is None else factors.U / D.sqrt()[:, None]  # from D^½ U back to U
    columns = stored.T.float().contiguous()
    for k, b in enumerate(widths):
        e_u = lost_shares(columns, b, None if D is None else D.float()) * energy_of_V(factors, X)
        # fp32 sees a column to 2^-24, relative to a rounding error of >= 1e-2 of an entry: 1e-4.
        np.testing.assert_allclose(array(both - v_alone)[:, k], e_u, rtol=1e-4)


def test_long_gaussian_columns_lose_what_theory_says():
    """Max (1960), table II: uniform quantizers for Gaussian signals. 4 x 2^16 samples leave a
    deviation of 0.3 %; the search adds up to 1 % at 5 bits."""
    rng = np.random.default_rng(2)
    U = torch.from_numpy(rng.standard_normal((2**16, 4)) / 2**8)
    factors = Factors(U, torch.ones(4).double(), torch.eye(4).double())
    pairs = [(b, b) for b in (1, 2, 3, 4, 5)]
    errors = simulate(factors, identity(4), (1, 2, 3, 4, 5)).errors(pairs)
    v_alone = simulate(factors, identity(4), (1, 2, 3, 4, 5), include_u=False).errors(pairs)
    measured = array((errors - v_alone)[:, :5]).mean(axis=0)
    published = [0.363, 0.119, 0.0374, 0.0115, 0.0035]
    theory = [gaussian_rounding_loss(b) for b in (1, 2, 3, 4, 5)]
    np.testing.assert_allclose(theory, published, rtol=6e-3)  # they have three digits
    np.testing.assert_allclose(measured, theory, rtol=0.013)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bits_per_weight", [0.5, 1.0])
def test_the_plans_summed_errors_predict_the_real_error(seed, bits_per_weight, separate):
    """One pass without correction is what is simulated. U V − Û V̂ = U ΔV + ΔU V − ΔU ΔV: the
    objective has the first two terms' energies. The third's is of second order, and GPTQ gains a
    little on ΔU by V̂'s rows not being exactly orthogonal: 0 to 1.5 % below, never above."""
    rng = np.random.default_rng(seed)
    out = n = 256
    X, delta = layer_inputs(rng, n, 512), layer_delta(rng, out, n)
    config = Config(bits_per_weight=bits_per_weight, passes=1, correction=False,
                    svd_damping=0.0, unbiased=False, separate_widths=separate)
    H = hessian(torch.from_numpy(X @ X.T), DAMPING)
    plans = []

    def solve(*arguments, **options):
        plans.append((array(arguments[0]), allocate(*arguments, **options)))
        return plans[0][1]

    result = quantize_matrix(torch.from_numpy(delta), H, config, solve=solve)
    X = damped_inputs(X, DAMPING)
    errors, plan = plans[0]
    predicted = errors[np.arange(len(plan)), plan.numpy()].sum()
    total = ((delta @ X) ** 2).sum()
    cut_off = total - errors[:, -1].sum()  # components that were no candidates
    real = output_error(delta, result.delta.dequantize(), X) * total
    assert 0.985 <= real / (predicted + cut_off) <= 1.0


def test_a_row_of_an_orthonormal_basis_at_8_bits_is_all_but_exact():
    """A floor on errors: 8 bits lose about 1e-4 of the energy, never 2 % of it."""
    rng = np.random.default_rng(3)
    U, V = (torch.from_numpy(orthonormal(rng, 64, 6)) for _ in range(2))
    factors = Factors(U, torch.ones(6).double(), V.T.contiguous())
    errors = simulate(factors, identity(64), (8,)).errors([(8, 8)])
    assert (errors[:, 0] < 5e-4).all() and (errors[:, 0] > 5e-6).all()
    np.testing.assert_allclose(array(errors[:, 1]), 1, rtol=1e-12)
