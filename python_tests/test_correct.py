"""correct and solve_rows: against least squares on the inputs themselves."""

import numpy as np
import pytest
import torch
from reference import array, best_rows, corrected_U, damped_inputs, layer_delta, layer_inputs

from adamix.compression.correct import component_gram, correct, solve_rows
from adamix.compression.hessian import INVERSE_RIDGE, hessian

DAMPING = 0.01


def case(out, n, rank, tokens, seed=0):
    """ΔW, A = diag(s) V̂ (coarse: V rounded to a grid), the Hessian and the inputs behind it."""
    rng = np.random.default_rng(seed)
    X = layer_inputs(rng, n, tokens)
    delta = layer_delta(rng, out, n)
    A = np.arange(1, rank + 1)[:, None] ** -0.7 * np.round(rng.standard_normal((rank, n)) * 2) / 7
    H = hessian(torch.from_numpy(X @ X.T), DAMPING)
    return torch.from_numpy(delta), torch.from_numpy(A), H, damped_inputs(X, DAMPING)


CASES = [(20, 33, 8, 200), (33, 20, 20, 200), (7, 40, 1, 3), (24, 48, 16, 5), (1, 16, 4, 40)]


def assert_shrunk_by_ridge_alone(got, exact, gram):
    """A ridge ε on the normal equations G x = g gives (1 + ε G⁻¹)⁻¹ times the exact solution: it
    differs by at most ε / smallest eigenvalue of G. The cases keep that below 5e-3."""
    ridge = INVERSE_RIDGE * np.trace(gram) / gram.shape[0]
    bound = ridge / np.linalg.eigvalsh(gram)[0]
    assert bound < 5e-3
    got, exact = array(got), array(exact)
    assert np.linalg.norm(got - exact) <= (bound + 1e-9) * np.linalg.norm(exact)


@pytest.mark.parametrize("dims", CASES)
def test_the_corrected_U_is_the_least_squares_fit_to_the_outputs(dims):
    delta, A, H, X = case(*dims)
    U = correct(delta, A, H, component_gram(A, H))
    AX = array(A) @ X
    assert_shrunk_by_ridge_alone(U, corrected_U(delta, A, X), AX @ AX.T)


@pytest.mark.parametrize("dims", CASES)
def test_what_is_left_after_correction_is_orthogonal_to_the_components_but_for_the_ridge(dims):
    """(ΔW − Ũ A) H Aᵀ = ε Ũ exactly, ε = 1e-6 of the mean diagonal of A H Aᵀ."""
    delta, A, H, X = case(*dims, seed=1)
    U = array(correct(delta, A, H, component_gram(A, H)))
    AX = array(A) @ X
    left = (array(delta) @ X - U @ AX) @ AX.T
    ridge = 1e-6 * (AX**2).sum() / AX.shape[0]
    scale = np.linalg.norm(array(delta) @ X) * np.linalg.norm(AX)
    # fp64 rounding of the sums and of the triangular solves: eps · condition (<= 1e4) · scale.
    np.testing.assert_allclose(left, ridge * U, rtol=0, atol=1e-12 * scale)
    assert np.abs(ridge * U).max() > 50 * 1e-12 * scale  # so a ridge off by 2 % fails


def test_no_other_multiple_of_the_corrected_U_fits_better():
    delta, A, H, X = case(20, 33, 8, 200, seed=2)
    U = array(correct(delta, A, H, component_gram(A, H)))

    def lost(factor):
        return ((array(delta) @ X - factor * U @ array(A) @ X) ** 2).sum()

    assert lost(1.0) < min(lost(0.999), lost(1.001))


def test_the_component_gram_is_that_of_the_components_outputs():
    _, A, H, X = case(20, 33, 8, 200, seed=3)
    gram = (array(A) @ X) @ (array(A) @ X).T
    expected = gram + 1e-6 * np.trace(gram) / 8 * np.eye(8)
    np.testing.assert_allclose(array(component_gram(A, H)), expected, rtol=0,
                               atol=1e-13 * np.trace(gram))


def test_components_that_repeat_each_other_still_have_a_finite_solution():
    delta, A, H, X = case(20, 33, 4, 200, seed=4)
    twice = torch.cat([A, A])
    U = correct(delta, twice, H, component_gram(twice, H))
    alone = correct(delta, A, H, component_gram(A, H))
    fitted, expected = array(U @ twice) @ X, array(alone @ A) @ X
    # The ridge alone separates them: it may move each of the two fits by its share of 1e-6 · the
    # condition of the 4 components (< 100).
    assert np.linalg.norm(fitted - expected) <= 2e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("dims", [(33, 20, 8), (20, 33, 8), (20, 31, 20), (9, 5, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_solved_rows_are_the_weighted_least_squares_fit_to_the_delta(dims, weighted):
    out, n, rank = dims
    rng = np.random.default_rng(5)
    delta = layer_delta(rng, out, n)
    B = rng.standard_normal((out, rank)) * np.arange(1, rank + 1) ** -0.7
    D = rng.uniform(0.01, 1, out) if weighted else np.ones(out)
    V = solve_rows(torch.from_numpy(delta), torch.from_numpy(B),
                   torch.from_numpy(D) if weighted else None)
    gram = (B * D[:, None]).T @ B
    ridge = 1e-6 * np.trace(gram) / rank
    exact = np.linalg.solve(gram + ridge * np.eye(rank), (B * D[:, None]).T @ delta)
    np.testing.assert_allclose(array(V), exact, rtol=0, atol=1e-9 * np.abs(exact).max())
    if rank < out:  # a square B fits exactly, and its smallest eigenvalue is no match for a ridge
        assert_shrunk_by_ridge_alone(V, best_rows(delta, B, D), gram)
