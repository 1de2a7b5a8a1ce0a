"""QuantizedDelta -> PackedDelta: the same numbers, in words that can be counted by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import packed_factor
from tolerance import assert_within_rounding

from adamix.artifacts import PackedDelta, QuantizedDelta
from adamix.storage.pack import pack


def quantized(out, n, bits, *, exact=True, seed=0):
    """Random codes; with `exact` every sum of Δ̂ is a whole number below 2²⁴ times 2⁻¹⁰."""
    generator = torch.Generator().manual_seed(seed)
    limit = 2 ** torch.tensor(bits, dtype=torch.int64)[:, None]

    def codes(width):
        drawn = torch.randint(0, 256, (len(bits), width), generator=generator)
        return (drawn % limit).to(torch.uint8)

    scales = torch.rand(len(bits), generator=generator) + 1e-3
    if exact:
        scales = 2.0 ** torch.randint(-10, -8, (len(bits),), generator=generator)
    return QuantizedDelta(codes(out), codes(n), torch.tensor(bits, dtype=torch.int32), scales)


def by_hand(delta):
    """Û diag(scales) V̂ in float64, and with every product by its absolute value."""
    odd = (2 ** delta.bits.double() - 1)[:, None]
    U, V = 2 * delta.U_codes.double() - odd, 2 * delta.V_codes.double() - odd
    scaled = delta.scales.double()[:, None] * U
    return scaled.T @ V, scaled.abs().T @ V.abs()


@settings(max_examples=60, deadline=None)
@given(out=st.sampled_from([1, 31, 32, 33, 256, 600]),
       n=st.sampled_from([1, 32, 70, 255, 257, 512]),
       bits=st.lists(st.integers(1, 8), max_size=20), seed=st.integers(0, 99))
def test_packed_numbers_are_the_quantized_ones_to_the_bit(out, n, bits, seed):
    delta = quantized(out, n, sorted(bits, reverse=True), seed=seed)
    packed = pack(delta)
    exact, _ = by_hand(delta)
    assert torch.equal(packed.dequantize().double(), exact)
    assert torch.equal(packed.dequantize(), delta.dequantize())
    assert packed.words.dtype == torch.int32 and packed.scales.dtype == torch.float32
    assert (packed.shape, packed.rank) == ((out, n), len(bits))
    assert packed.widths == {b: bits.count(b) for b in range(8, 0, -1) if b in bits}
    assert packed.counts == tuple(bits.count(b) for b in range(8, 0, -1))


def test_any_scale_is_within_rounding():
    delta = quantized(97, 130, [8, 7, 6, 5, 4, 3, 2, 1, 1], exact=False)
    for restored in (pack(delta).dequantize(), delta.dequantize()):
        assert restored.dtype == torch.float32
        assert_within_rounding(restored, *by_hand(delta), terms=11)


def test_words_of_one_component_read_off_in_hexadecimal():
    """4 bits: codes 0..3 are the low digits of bytes 0, 2, 1, 3, codes 4..7 the high ones; V's row
    before U's column."""
    V = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8)
    U = torch.tensor([[15, 0]], dtype=torch.uint8)
    packed = pack(QuantizedDelta(U, V, torch.tensor([4], dtype=torch.int32), torch.tensor([0.5])))
    words = [int(word) & 0xFFFFFFFF for word in packed.words]
    assert words == [0x84627351, 0x00000009, 0, 0, 0x0000000F, 0, 0, 0]
    assert packed.counts == (0, 0, 0, 0, 1, 0, 0, 0)
    row = [0.5 * 15 * (2 * code - 15) for code in range(1, 10)]
    assert packed.dequantize().tolist() == [row, [-x for x in row]]


@pytest.mark.parametrize("out, n", [(1, 255), (256, 257), (300, 512), (513, 700)])
def test_factors_lie_panel_by_panel_first_v_then_u(out, n):
    delta = quantized(out, n, [8, 7, 5, 3, 3, 1])
    words = [word & 0xFFFFFFFF for word in pack(delta).words.tolist()]
    bits = delta.bits.tolist()
    V, U = (packed_factor(codes.tolist(), bits) for codes in (delta.V_codes, delta.U_codes))
    assert words == V + U


def test_a_panel_holds_256_codes_of_every_lane():
    """Two lanes of 8 bits, 257 codes: 64 words of each, then the 257th codes' blocks."""
    V = torch.tensor([[1] * 256 + [2], [3] * 256 + [4]], dtype=torch.uint8)
    U = torch.tensor([[5], [6]], dtype=torch.uint8)
    packed = pack(QuantizedDelta(U, V, torch.tensor([8, 8], dtype=torch.int32), torch.ones(2)))
    last = [[code] + [0] * 7 for code in (2, 4, 5, 6)]
    assert packed.words.tolist() == [0x01010101] * 64 + [0x03030303] * 64 + sum(last, [])


def test_bytes_are_words_scales_and_a_row_of_counts():
    packed = pack(quantized(40, 70, [8, 3, 3, 1]))
    words = (8 + 3 + 3 + 1) * (3 + 2)  # 70 codes are 3 blocks of 32, 40 are 2
    assert packed.nbytes == 4 * (words + 4 + 8)
    assert packed.bits_per_weight == 8 * packed.nbytes / 2800


def test_a_delta_without_components_is_zero_and_takes_its_counts():
    packed = pack(quantized(5, 7, []))
    assert packed.words.numel() == packed.rank == 0 and packed.nbytes == 32
    assert torch.equal(packed.dequantize(), torch.zeros(5, 7))


def test_components_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"descending.*\[3, 4\]"):
        pack(quantized(5, 7, [3, 4]))


@pytest.mark.parametrize("words, scales", [(-1, 0), (1, 0), (0, 1), (0, -1)])
def test_a_packed_delta_whose_words_or_scales_do_not_fit_is_refused(words, scales):
    good = pack(quantized(40, 70, [4, 4]))

    def resized(tensor, by):
        return torch.cat([tensor, tensor[:1]]) if by > 0 else tensor[: len(tensor) + by]

    with pytest.raises(ValueError, match="40 x 70"):
        PackedDelta(resized(good.words, words), resized(good.scales, scales), good.counts, (40, 70))
