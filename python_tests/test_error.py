"""The relative output error, by the Gram matrix and by the Hessian made of it."""

import math

import pytest
import torch

from adamix.compression.error import output_error, relative_error
from adamix.compression.hessian import hessian


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_the_error_by_the_hessian_is_that_by_its_gram_matrix(weighted, damping):
    torch.manual_seed(0)
    out, n, tokens = 24, 40, 30  # fewer tokens than inputs: some directions are never seen
    X = torch.randn(n, tokens, dtype=torch.float64) * torch.rand(n, 1)
    delta = torch.randn(out, n, dtype=torch.float64)
    restored = delta + 0.1 * torch.randn(out, n)
    weights = torch.rand(out) + 0.1 if weighted else None
    lost, whole = ((D.double() if weights is None else weights.double().sqrt()[:, None] * D) @ X
                   for D in (delta - restored, delta))
    gram = 7.0 * X @ X.T  # in any unit
    expected = (lost.square().sum() / whole.square().sum()).item()
    assert relative_error(delta, restored, gram, weights) == pytest.approx(expected, rel=1e-12)
    found = output_error(delta, restored, hessian(gram, damping), weights)
    assert found == pytest.approx(expected, rel=1e-10)


def test_what_no_input_sees_is_no_error():
    torch.manual_seed(0)
    X = torch.randn(8, 100, dtype=torch.float64)
    X[4:] = 0
    H = hessian(X @ X.T, 0.01)
    seen, unseen = torch.zeros(5, 8), torch.zeros(5, 8)
    seen[:, :4], unseen[:, 4:] = torch.randn(5, 4), torch.randn(5, 4)
    assert output_error(seen + unseen, seen, H) == 0.0
    assert output_error(unseen, torch.zeros(5, 8), H) == 0.0
    assert output_error(unseen, seen, H) == math.inf  # an error where there was nothing
    assert output_error(seen, torch.zeros(5, 8), H) == pytest.approx(1.0, rel=1e-12)
