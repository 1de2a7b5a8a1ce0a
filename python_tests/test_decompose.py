"""decompose: against the SVD of the outputs ΔW X themselves."""

import numpy as np
import pytest
import torch
from reference import array, damped_inputs, layer_delta, layer_inputs, svd

from adamix.compression.decompose import decompose
from adamix.compression.hessian import hessian, identity

DAMPING = 0.01
SHAPES = [(24, 40), (40, 24), (32, 32), (31, 33), (33, 31), (1, 20), (20, 1)]
# eigh of the squared matrix loses eps · (energy ratio <= 1e4) / (relative gap >= 1e-3) in an
# eigenvector; what is stated here leaves 2 digits to that and 5 digits below an error of 2 %.
CLOSE = 1e-7


def case(shape, rank=None, seed=0):
    """ΔW, its Hessian, and the inputs whose outer product the Hessian is."""
    rng = np.random.default_rng(seed)
    X = layer_inputs(rng, shape[1], 100)
    delta = layer_delta(rng, *shape, rank=rank)
    return delta, hessian(torch.from_numpy(X @ X.T), DAMPING), damped_inputs(X, DAMPING)


def signed(U, V):
    """The convention: the largest entry of every column of U is positive."""
    signs = np.sign(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])])
    return U * signs, V * signs[:, None]


def assert_is_svd_of_outputs(factors, delta, X, rank):
    """U and the output energies from the SVD of ΔW X; s and V from ΔW = U diag(s) V."""
    U, sigma, _ = svd(delta @ X)
    U, _ = signed(U[:, :rank], np.zeros((rank, 1)))
    np.testing.assert_allclose(array(factors.U), U, rtol=0, atol=CLOSE)
    rows = U.T @ delta
    s = np.sqrt((rows**2).sum(axis=1))
    np.testing.assert_allclose(array(factors.s), s, rtol=CLOSE)
    np.testing.assert_allclose(array(factors.V), rows / s[:, None], rtol=0, atol=CLOSE * 10)
    energies = ((array(factors.s)[:, None] * array(factors.V) @ X) ** 2).sum(axis=1)
    np.testing.assert_allclose(energies, sigma[:rank] ** 2, rtol=CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_aware_components_are_the_svd_of_the_outputs(shape):
    delta, H, X = case(shape)
    factors = decompose(torch.from_numpy(delta), H, 1000)
    assert factors.s.shape == (min(shape),)
    assert_is_svd_of_outputs(factors, delta, X, min(shape))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_delta_of_low_rank_has_that_many_components(shape, rank):
    delta, H, X = case(shape, rank=rank, seed=1)
    for plain in (False, True):
        factors = decompose(torch.from_numpy(delta), H, 1000, plain=plain)
        assert factors.s.shape == (rank,)
    assert_is_svd_of_outputs(decompose(torch.from_numpy(delta), H, 1000), delta, X, rank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plain", [False, True])
def test_all_components_together_are_the_delta(shape, plain):
    delta, H, _ = case(shape, seed=2)
    factors = decompose(torch.from_numpy(delta), H, 1000, plain=plain)
    U, s, V = array(factors.U), array(factors.s), array(factors.V)
    np.testing.assert_allclose((U * s) @ V, delta, rtol=0, atol=1e-10)
    np.testing.assert_allclose(U.T @ U, np.eye(len(s)), rtol=0, atol=1e-10)
    np.testing.assert_allclose((V**2).sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(s[:, None] * V, U.T @ delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_components_are_the_svd_of_the_delta(shape):
    delta, H, _ = case(shape, seed=3)
    factors = decompose(torch.from_numpy(delta), H, 1000, plain=True)
    U, s, V = svd(delta)
    U, V = signed(U, V)
    np.testing.assert_allclose(array(factors.U), U, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(array(factors.s), s, rtol=CLOSE)
    np.testing.assert_allclose(array(factors.V), V, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("plain", [False, True])
def test_fewer_components_are_the_leading_ones(shape, plain):
    delta, H, X = case(shape, seed=4)
    everything = decompose(torch.from_numpy(delta), H, 1000, plain=plain)
    few = decompose(torch.from_numpy(delta), H, 7, plain=plain)
    assert torch.allclose(few.U, everything.U[:, :7], rtol=0, atol=1e-12)
    assert torch.allclose(few.V, everything.V[:7], rtol=0, atol=1e-12)
    energies = ((array(everything.s)[:, None] * array(everything.V) @ X) ** 2).sum(axis=1)
    if not plain:  # Eckart-Young: no other 7 components lose less output
        lost = delta @ X - (array(few.U) * array(few.s)) @ array(few.V) @ X
        assert (lost**2).sum() == pytest.approx((svd(delta @ X)[1][7:] ** 2).sum(), rel=1e-9)
        assert (np.diff(energies) < 0).all()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_under_white_inputs_both_decompositions_are_one(shape):
    delta, _, _ = case(shape, seed=5)
    aware = decompose(torch.from_numpy(delta), identity(shape[1]), 1000)
    plain = decompose(torch.from_numpy(delta), identity(shape[1]), 1000, plain=True)
    np.testing.assert_allclose(array(aware.U), array(plain.U), rtol=0, atol=CLOSE)
    np.testing.assert_allclose(array(aware.s), array(plain.s), rtol=CLOSE)


def test_the_delta_is_read_in_any_float_type_and_left_alone():
    delta, H, X = case((24, 40), seed=6)
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.from_numpy(delta).to(dtype)
        kept = given.clone()
        factors = decompose(given, H, 1000)
        assert torch.equal(given, kept)
        assert factors.U.dtype == factors.s.dtype == factors.V.dtype == torch.float64
        assert_is_svd_of_outputs(factors, array(given.double()), X, 24)
