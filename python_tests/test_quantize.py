"""quantize: scales against a dense grid, codes against Optimal Brain Quantization."""

import numpy as np
import pytest
import torch
from reference import (
    array,
    layer_inputs,
    least_rounding_error,
    levels,
    nearest_code,
    orthonormal,
    quantize_in_order,
    rounding_error,
)

from adamix.compression.correct import component_gram
from adamix.compression.hessian import hessian
from adamix.compression.quantize import (
    nearest_codes,
    quantize_columns,
    quantize_rows,
    search_scales,
)


def lane_of(kind, n=300, seed=0):
    rng = np.random.default_rng(seed)
    lane = {"gaussian": rng.standard_normal, "laplace": lambda n: rng.laplace(size=n),
            "uniform": lambda n: rng.uniform(-1, 1, n)}.get(kind, rng.standard_normal)(n)
    if kind.startswith("outlier"):
        lane[n // 3] = float(kind.removeprefix("outlier"))
    return lane.astype(np.float32)


def searched(lane, bits, weights=None):
    return search_scales(torch.from_numpy(lane)[None], torch.tensor([bits], dtype=torch.int32),
                         None if weights is None else torch.from_numpy(weights)).item()


KINDS = ["gaussian", "laplace", "uniform", "outlier10", "outlier30", "outlier100", "outlier1000"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_within_1_percent_of_the_best_scales_error(kind, bits):
    lane = lane_of(kind)
    found = rounding_error(lane, searched(lane, bits), bits)
    assert found <= 1.01 * least_rounding_error(lane, bits)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_at_high_widths_the_scale_is_near_the_best_on_the_scale_of_the_lane(kind, bits):
    """Where a lane has few more entries than levels the error is ragged in the scale, and the last
    20 % of 1e-3..1e-5 of the energy are not worth a finer search."""
    lane = lane_of(kind)
    found = rounding_error(lane, searched(lane, bits), bits)
    assert found <= 1.2 * least_rounding_error(lane, bits)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform"])
def test_the_scale_is_the_least_squares_scale_of_its_own_codes(kind, bits, weighted):
    """At the optimum the scale is a fixed point. The error is flat there (2 % in the scale cost
    0.1 % at 1 bit), so this is what sees a scale that is off; 3 alternations stop within 0.5 %."""
    lane, D = lane_of(kind), np.ones(300, dtype=np.float32)
    if weighted:
        D = np.random.default_rng(1).uniform(0.01, 1, 300).astype(np.float32)
    scale = searched(lane, bits, D if weighted else None)
    level = levels(bits)[[nearest_code(w, scale, bits) for w in lane]]
    assert scale == pytest.approx((D * lane) @ level / (D * level @ level), rel=5e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weights_move_the_scale_to_the_best_weighted_error(bits):
    rng = np.random.default_rng(2)
    lane = lane_of("laplace", seed=3)
    weights = np.where(np.abs(lane) > 1.5, 20.0, rng.uniform(0.01, 0.1, 300)).astype(np.float32)
    least = least_rounding_error(lane, bits, weights)
    assert rounding_error(lane, searched(lane, bits, weights), bits, weights) <= 1.01 * least
    assert rounding_error(lane, searched(lane, bits), bits, weights) > 1.1 * least


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("value", [0.37, -1e-9, 3e8])
def test_a_constant_lane_is_exact(bits, value):
    lane = np.full(33, value, dtype=np.float32)
    # The scale, an odd fraction of the value, is one fp32 number: 2^-24, and as much in the search.
    assert rounding_error(lane, searched(lane, bits), bits) <= (2.0**-22 * value) ** 2 * 33


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_lane_of_zeros_gets_a_positive_scale_that_vanishes(bits):
    scale = searched(np.zeros(33, dtype=np.float32), bits)
    assert 0 < scale < 1e-20


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("n", [1, 2, 31])
def test_short_lanes_get_finite_scales_and_one_entry_is_exact(n, bits):
    lane = lane_of("gaussian", n, seed=4)
    error = rounding_error(lane, searched(lane, bits), bits)
    if n == 1:
        assert error <= (2.0**-22 * lane[0]) ** 2  # two roundings to fp32: of scale and product
    else:
        assert error <= 1.01 * rounding_error(lane, np.abs(lane).max() / (2**bits - 1), bits)


def test_lanes_are_searched_independently_each_at_its_width():
    lanes = np.stack([lane_of(kind) for kind in KINDS] * 2)
    bits = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    together = search_scales(torch.from_numpy(lanes), bits)
    alone = [searched(lane, b) for lane, b in zip(lanes, bits.tolist(), strict=True)]
    assert together.tolist() == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_nearest_code_is_the_nearest_of_all_codes(bits):
    rng = np.random.default_rng(bits)
    scale = np.float32(0.37)
    lane = rng.uniform(-1.3, 1.3, 200).astype(np.float32) * np.float32(2**bits) * scale
    lane = np.append(lane, scale * levels(bits)).astype(np.float32)  # and the levels themselves
    codes = nearest_codes(torch.from_numpy(lane)[None], torch.tensor([bits]), torch.tensor([scale]))
    assert codes[0].tolist() == [nearest_code(w, float(scale), bits) for w in lane]
    assert codes.min() == 0 and codes.max() == 2**bits - 1


def test_zero_lies_between_two_levels_and_takes_the_upper():
    codes = nearest_codes(torch.zeros(3, 1), torch.tensor([1, 2, 8]), torch.ones(3))
    assert codes.flatten().tolist() == [1, 2, 128]


def hessian_of(n, tokens=60, seed=5):
    X = layer_inputs(np.random.default_rng(seed), n, tokens)
    return hessian(torch.from_numpy(X @ X.T), 0.01)


@pytest.mark.parametrize("n", [1, 2, 31, 33, 40])
def test_rows_are_quantized_as_optimal_brain_quantization_heaviest_input_first_says(n):
    H = hessian_of(n)
    bits = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.int32)
    rows = torch.from_numpy(np.random.default_rng(6).standard_normal((8, n)) / np.sqrt(n))
    lanes = quantize_rows(rows, bits, H)
    assert torch.equal(lanes.scales, search_scales(rows.float(), bits))
    assert lanes.codes.dtype == torch.uint8 and torch.equal(lanes.bits, bits)
    order = torch.from_numpy(np.argsort(-H.matrix.diagonal().numpy(), kind="stable"))
    assert n < 3 or not torch.equal(order, torch.arange(n))
    expected = quantize_in_order(rows.float()[:, order], H.matrix[order][:, order], bits,
                                 lanes.scales, by_row=True)
    assert lanes.codes[:, order].tolist() == expected.tolist()


@pytest.mark.parametrize(("out", "rank"), [(1, 1), (7, 2), (9, 31), (5, 33)])
@pytest.mark.parametrize("weighted", [False, True])
def test_columns_are_quantized_as_optimal_brain_quantization_in_order_says(out, rank, weighted):
    rng = np.random.default_rng(7)
    H = hessian_of(40, tokens=200)
    V_hat = orthonormal(rng, 40, rank).T + 0.05 * rng.standard_normal((rank, 40))
    A = torch.from_numpy(np.arange(1, rank + 1)[:, None] ** -0.5 * V_hat)
    gram = component_gram(A, H)
    U = torch.from_numpy(rng.standard_normal((out, rank)))
    bits = torch.arange(rank, dtype=torch.int32).flip(0) % 8 + 1
    D = torch.from_numpy(rng.uniform(0.01, 1, out)) if weighted else None
    lanes = quantize_columns(U, bits, gram, D)
    columns = U.T.float().contiguous()
    assert torch.equal(lanes.scales, search_scales(columns, bits, None if D is None else D.float()))
    expected = quantize_in_order(U.float(), gram, bits, lanes.scales, by_row=False)
    assert lanes.codes.shape == (rank, out)
    assert lanes.codes.T.tolist() == expected.tolist()


def test_compensation_beats_rounding_to_nearest_on_the_inputs():
    """Why GPTQ at all; and a check that the Hessian, not its inverse, is minimised under."""
    n = 40
    H = hessian_of(n)
    rows = torch.from_numpy(np.random.default_rng(8).standard_normal((20, n)))
    bits = torch.full((20,), 3, dtype=torch.int32)
    lanes = quantize_rows(rows, bits, H)
    plain = 2 * nearest_codes(rows.float(), bits, lanes.scales).double() - 7
    plain = lanes.scales.double()[:, None] * plain

    def error(V_hat):
        lost = array(rows - V_hat)
        return (lost @ array(H.matrix) * lost).sum()

    assert error(lanes.dequantize()) < 0.75 * error(plain)
