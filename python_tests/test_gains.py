"""Scales that keep a component's size."""

import pytest
import torch

from adamix.artifacts import Factors
from adamix.compression.correct import LEAST_KEPT, MOST_GAIN, component_gains
from adamix.compression.hessian import hessian
from adamix.compression.matrix import quantize_matrix
from adamix.config import Config
from adamix.storage.pack import pack


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def test_gains_by_hand():
    U, V, s = orthonormal(20, 4, 0), orthonormal(30, 4, 1).T, torch.tensor([8.0, 4.0, 2.0, 1.0])
    shares = torch.tensor([1.25, 0.9, 0.64, 0.2], dtype=torch.float64)  # that are left of each
    across = orthonormal(20, 8, 2)[:, 4:]
    across = across - U @ (U.T @ across)  # noise beside a component changes nothing
    U_hat = U * (shares.sqrt() * s) + across
    gains = component_gains(Factors(U, s.double(), V), U_hat, V * shares.sqrt()[:, None])
    assert gains.tolist() == pytest.approx([0.8, 1 / 0.9, 1 / 0.64, 1.0])  # the last is lost
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert component_gains(Factors(U, s.double(), V), U * s, V * half[:, None]).tolist() == [
        MOST_GAIN] * 4 and LEAST_KEPT < 0.5


@pytest.mark.parametrize("weighted", [False, True])
def test_a_matrix_keeps_the_size_of_its_components(weighted):
    torch.manual_seed(0)
    out, n = 96, 128
    U, V = orthonormal(out, out, 3), orthonormal(n, out, 4).T
    s = (1 + torch.arange(out, dtype=torch.float64)) ** -0.8
    delta, X = (U * s) @ V, torch.randn(n, 4 * n, dtype=torch.float64)
    weights = torch.rand(out, dtype=torch.float64) + 0.5 if weighted else None
    H = hessian(X @ X.T, 0.01)
    sizes, scales = {}, {}
    for unbiased, gain in ((False, 1.0), (True, 0.0), (True, 1.0), (True, 1.5)):
        config = Config(bits_per_weight=1.0, bit_widths=(4, 3, 2), passes=1, unbiased=unbiased,
                        gain=gain)
        packed = pack(quantize_matrix(delta, H, config, row_weights=weights).delta)
        kept = (U.T @ packed.dequantize().double() @ V.T).diagonal() / s
        sizes[unbiased, gain] = kept[:6].mean().item()
        scales[unbiased, gain] = packed.scales.double()
    biased, kept = sizes[False, 1.0], sizes[True, 1.0]
    assert biased < 0.98 and abs(kept - 1) < 0.3 * abs(biased - 1) and sizes[True, 1.5] > kept
    plain = scales[False, 1.0]
    assert torch.equal(scales[True, 0.0], plain)
    torch.testing.assert_close(scales[True, 1.5] / plain, (scales[True, 1.0] / plain) ** 1.5,
                               rtol=1e-6, atol=0)
