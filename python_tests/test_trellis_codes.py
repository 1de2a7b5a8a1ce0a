"""The trellis codes of benchmarks/methods against their description."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from adamix.compression.hessian import hessian, inverse_upper
from adamix.compression.matrix import SCALE_BITS, component_bits

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
trellis, training, trellis_codes = (importlib.import_module(f"methods.{name}") for name in (
    "trellis", "trellis_training", "trellis_codes"))

WIDTHS = {2: 0.0763, 3: 0.0199, 4: 0.00581, 5: 0.00189}  # mean squared errors of N(0, 1)
SCALAR = {2: 0.119, 3: 0.0374, 4: 0.0115, 5: 0.0035}


def of(bits):
    return trellis.tables()[bits]


def random_codes(bits, blocks, seed=0):
    """Codes of blocks whose T and own bits are drawn at random, by the formula of the windows."""
    random = torch.Generator().manual_seed(seed)
    T = torch.randint(0, 2, (blocks, 32), generator=random)
    own = torch.randint(0, 2 ** (bits - 1), (blocks, 32), generator=random)
    v = of(bits).memory
    windows = torch.zeros(blocks, 32, dtype=torch.long)
    for i in range(32):
        for j in range(v + 1):
            windows[:, i] += T[:, (i - j) % 32] << (v - j)
    return T, own, windows * 2 ** (bits - 1) + own


def test_every_table_has_256_whole_levels_of_a_byte():
    assert set(trellis.tables()) == set(WIDTHS) == set(training.MEMORY)
    for bits, memory in training.MEMORY.items():
        levels = of(bits).levels
        assert levels.shape == (2 ** (memory + 1), 2 ** (bits - 1)) and levels.numel() == 256
        assert torch.equal(levels, levels.round()) and levels.abs().max() == 127
        assert (levels.diff(dim=1) >= 0).all() and of(bits).memory == memory


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_block_has_b_words_and_they_read_as_described(bits):
    T, own, codes = random_codes(bits, 50)
    words = trellis.pack(of(bits), codes)
    assert words.shape == (50, bits) and 0 <= words.min() and words.max() < 2**32
    assert torch.equal(words[:, 0], (T << torch.arange(32)).sum(dim=1))
    for j in range(bits - 1):
        assert torch.equal(words[:, 1 + j], ((own >> j & 1) << torch.arange(32)).sum(dim=1))
    assert torch.equal(trellis.unpack(of(bits), words), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_words_of_a_component_are_what_is_counted(bits):
    shape = (96, 160)
    words = sum(trellis.pack(of(bits), random_codes(bits, n // 32)[2]).numel() for n in shape)
    assert 32 * words + SCALE_BITS == component_bits(shape, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_the_words_hold_is_the_reconstruction(bits):
    lanes = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    scales = trellis_codes.find_scales(lanes, bits)
    codes = trellis.search(of(bits), (lanes / scales[:, None]).view(-1, 32))
    read = of(bits).values(trellis.unpack(of(bits), trellis.pack(of(bits), codes)))
    expected = trellis_codes.nearest(lanes, bits, scales)
    assert torch.equal(read.view(5, 96) * scales[:, None], expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_search_finds_blocks_that_have_no_error(bits):
    values = of(bits).values(random_codes(bits, 20)[2])
    assert torch.equal(of(bits).values(trellis.search(of(bits), values)), values)


def test_the_search_is_close_to_that_with_every_state_at_the_ends(monkeypatch):
    targets = of(4).unit * torch.randn(200, 32, generator=torch.Generator().manual_seed(2))

    def error():
        found = trellis.search(of(4), targets)
        return (of(4).values(found) - targets).square().sum().item()

    few = error()
    monkeypatch.setattr(trellis, "TRIED", of(4).states)
    assert error() <= few < 1.02 * error()


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_distortion_of_a_gaussian_is_the_measured_one(bits):
    got = training.distortion(of(bits), blocks=512)
    assert got == pytest.approx(WIDTHS[bits], rel=0.03)
    assert 4.0**-bits < got < 0.65 * SCALAR[bits]


def test_without_correlations_feedback_changes_nothing():
    targets = of(3).unit * torch.randn(20, 32, generator=torch.Generator().manual_seed(3))
    expected = trellis.search(of(3), targets)
    assert torch.equal(trellis.search(of(3), targets, torch.eye(32)), expected)


def test_feedback_inside_blocks_lowers_the_error_under_h(monkeypatch):
    random = torch.Generator().manual_seed(4)
    mixed = torch.randn(64, 64, generator=random) @ torch.randn(64, 200, generator=random)
    H = hessian(mixed @ mixed.T, 0.01)
    rows = torch.randn(30, 64, generator=random)

    def error(rounded):
        lost = rounded.double() - rows.double()
        return ((lost @ H.matrix) * lost).sum().item()

    with_it = error(trellis_codes.quantize_rows(rows, 2, H))
    monkeypatch.setattr(trellis_codes, "search", lambda *given: trellis.search(*given[:2]))
    between_blocks = error(trellis_codes.quantize_rows(rows, 2, H))
    nearest = error(trellis_codes.nearest(rows, 2, trellis_codes.find_scales(rows, 2)))
    print(with_it, between_blocks, nearest)
    assert with_it < 0.9 * between_blocks < 0.8 * nearest


def test_the_error_that_the_search_has_is_that_of_gptqs_loop():
    """The costs of the paths are squared errors after feedback, over the diagonal."""
    random = torch.Generator().manual_seed(5)
    inputs = torch.randn(32, 100, generator=random)
    upper = inverse_upper(hessian(inputs @ inputs.T, 0.01).matrix)
    targets = of(3).unit * torch.randn(4, 32, generator=random)
    found = trellis.paths(of(3), targets.T.contiguous(), torch.zeros(of(3).states, 4), upper)
    end = found.cost.argmin(dim=0)
    values = of(3).values(trellis.back(of(3), found, end)).T
    left, cost = targets.double(), torch.zeros(4, dtype=torch.float64)
    for i in range(32):
        lost = (left[:, i] - values[:, i]) / upper[i, i].double()
        left = left - lost[:, None] * upper[i].double()
        cost += lost.square()
    torch.testing.assert_close(found.cost.amin(dim=0).double(), cost, rtol=1e-4, atol=0)
