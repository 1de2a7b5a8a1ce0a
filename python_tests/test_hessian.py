"""Hessian: damping, factors, and what is refused."""

import numpy as np
import pytest
import torch
from reference import array, damped_inputs, layer_inputs

from adamix.compression.hessian import INVERSE_RIDGE, damp, hessian, identity

DAMPING = 0.01


def gram_of(n, tokens, seed=0):
    X = layer_inputs(np.random.default_rng(seed), n, tokens)
    return X, torch.from_numpy(X @ X.T)


# fp64 sums of a few hundred terms: 1e-12 leaves 4 digits to spare and sees a λ off by 1e-10.
EXACT = 1e-12


@pytest.mark.parametrize(("n", "tokens"), [(1, 1), (2, 7), (31, 200), (33, 10), (64, 64)])
def test_the_matrix_is_the_gram_at_mean_diagonal_1_plus_damping(n, tokens):
    X, gram = gram_of(n, tokens)
    H = hessian(gram, DAMPING)
    expected = X @ X.T / (np.trace(X @ X.T) / n) + DAMPING * np.eye(n)
    np.testing.assert_allclose(array(H.matrix), expected, rtol=0, atol=EXACT * n)
    assert H.matrix.diagonal().mean().item() == pytest.approx(1 + DAMPING, rel=EXACT)


def test_damping_acts_like_one_further_token_for_each_channel():
    X, gram = gram_of(31, 50)
    X_damped = damped_inputs(X, 0.3)
    H = hessian(gram, 0.3)
    np.testing.assert_allclose(array(H.matrix), X_damped @ X_damped.T, rtol=0, atol=EXACT * 31)


@pytest.mark.parametrize(("n", "tokens"), [(1, 1), (31, 200), (33, 10)])
def test_the_factors_reproduce_the_matrix_and_its_inverse(n, tokens):
    H = hessian(gram_of(n, tokens)[1], DAMPING)
    assert torch.equal(H.lower, H.lower.tril())
    np.testing.assert_allclose(array(H.lower @ H.lower.T), array(H.matrix), rtol=0, atol=EXACT * n)

    upper = H.inverse_upper
    assert upper.dtype == torch.float32 and upper.is_contiguous()
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    order = np.argsort(-array(H.matrix).diagonal(), kind="stable")  # the heaviest input first
    assert H.order.tolist() == order.tolist()
    inverse = np.linalg.inv(array(H.matrix))[np.ix_(order, order)]
    # Each entry of the factor is rounded to fp32 (2^-24 relative), and an entry of the product is
    # the sum of at most n products of two such: 2 · 2^-24 · Σ|a||b| <= 2^-23 · max diag(H⁻¹).
    bound = 2.0**-23 * inverse.diagonal().max() * 1.01
    assert np.abs(array(upper).T @ array(upper) - inverse).max() <= bound


def test_the_unit_of_the_gram_matrix_does_not_matter():
    gram = gram_of(40, 100)[1]
    reference = hessian(gram, DAMPING)
    for unit in (2.0**-40, 2.0**40):  # powers of two: equal to the last bit
        H = hessian(gram * unit, DAMPING)
        assert torch.equal(H.matrix, reference.matrix)
        assert torch.equal(H.inverse_upper, reference.inverse_upper)
    for unit in (1e-12, 1e12):
        H = hessian(gram * unit, DAMPING)
        np.testing.assert_allclose(array(H.matrix), array(reference.matrix), rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_of_lower_precision_is_factorized_in_fp64_and_left_alone(dtype):
    gram = gram_of(33, 100)[1].to(dtype)
    kept = gram.clone()
    H = hessian(gram, DAMPING)
    assert torch.equal(gram, kept) and gram.dtype == dtype
    assert H.matrix.dtype == H.lower.dtype == torch.float64
    exact = gram.double() / gram.double().diagonal().mean() + DAMPING * torch.eye(33).double()
    np.testing.assert_allclose(array(H.matrix), array(exact), rtol=0, atol=EXACT)


def test_one_token_is_enough_for_a_factorization():
    X, gram = gram_of(64, 1)
    H = hessian(gram, DAMPING)
    assert torch.isfinite(H.lower).all() and torch.isfinite(H.inverse_upper).all()
    # All directions but the token's own are worth λ: λ^-½ is the factor's last diagonal entry.
    assert np.linalg.eigvalsh(array(H.matrix))[:-1] == pytest.approx(DAMPING, rel=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gram_that_is_not_finite_is_refused(bad):
    gram = gram_of(8, 20)[1]
    gram[3, 5] = gram[5, 3] = bad
    with pytest.raises(ValueError, match="Gram matrix holds NaN or Inf"):
        hessian(gram, DAMPING)


def test_a_zero_gram_is_refused():
    with pytest.raises(ValueError, match="Gram matrix is zero"):
        hessian(torch.zeros(8, 8), DAMPING)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4,), (2, 4, 4)])
def test_a_gram_that_is_not_square_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=r"square.*got \(" + str(shape[0])):
        hessian(torch.ones(shape), DAMPING)


def test_damp_adds_a_share_of_the_mean_diagonal():
    matrix = torch.tensor([[1.0, 2.0], [2.0, 5.0]], dtype=torch.float64)
    assert damp(matrix, 0.5).tolist() == [[2.5, 2.0], [2.0, 6.5]]  # mean diagonal 3
    assert INVERSE_RIDGE == 1e-6


def test_the_identity_is_its_own_factors():
    H = identity(5)
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.equal(H.matrix, eye) and torch.equal(H.lower, eye)
    assert torch.equal(H.inverse_upper, eye.float())
