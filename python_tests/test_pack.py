"""QuantizedDelta -> PackedDelta: the same numbers, in words that can be counted by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import packed_factor
from tolerance import assert_within_rounding

from adamix.artifacts import PackedDelta, QuantizedDelta
from adamix.storage.pack import pack


def quantized(out, n, v_bits, u_bits=None, *, exact=True, seed=0):
    """Random codes, without `u_bits` of one width a component; with `exact` every sum of Δ̂ is a
    whole number below 2²⁴ times 2⁻¹⁰."""
    generator = torch.Generator().manual_seed(seed)
    v_bits, u_bits = (torch.tensor(bits, dtype=torch.int32)
                      for bits in (v_bits, v_bits if u_bits is None else u_bits))

    def codes(length, bits):
        drawn = torch.randint(0, 256, (len(bits), length), generator=generator)
        return (drawn % 2 ** bits[:, None]).to(torch.uint8)

    scales = torch.rand(len(v_bits), generator=generator) + 1e-3
    if exact:
        scales = 2.0 ** torch.randint(-10, -8, (len(v_bits),), generator=generator)
    return QuantizedDelta(codes(out, u_bits), codes(n, v_bits), u_bits, v_bits, scales)


def by_hand(delta):
    """Û diag(scales) V̂ in float64, and with every product by its absolute value."""
    U, V = (2 * codes.double() - (2 ** bits.double() - 1)[:, None]
            for codes, bits in ((delta.U_codes, delta.u_bits), (delta.V_codes, delta.v_bits)))
    scaled = delta.scales.double()[:, None] * U
    return scaled.T @ V, scaled.abs().T @ V.abs()


@settings(max_examples=60, deadline=None)
@given(out=st.sampled_from([1, 31, 32, 33, 256, 600]),
       n=st.sampled_from([1, 32, 70, 255, 257, 512]),
       pairs=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), max_size=20),
       seed=st.integers(0, 99))
def test_packed_numbers_are_the_quantized_ones_to_the_bit(out, n, pairs, seed):
    v_bits, u_bits = (sorted((pair[k] for pair in pairs), reverse=True) for k in (0, 1))
    delta = quantized(out, n, v_bits, u_bits, seed=seed)
    packed = pack(delta)
    exact, _ = by_hand(delta)
    assert torch.equal(packed.dequantize().double(), exact)
    assert torch.equal(packed.dequantize(), delta.dequantize())
    assert packed.words.dtype == torch.int32 and packed.scales.dtype == torch.float32
    assert (packed.shape, packed.rank) == ((out, n), len(pairs))
    assert packed.v_widths == {b: v_bits.count(b) for b in range(8, 0, -1) if b in v_bits}
    assert packed.u_widths == {b: u_bits.count(b) for b in range(8, 0, -1) if b in u_bits}
    assert packed.v_counts == tuple(v_bits.count(b) for b in range(8, 0, -1))
    assert packed.u_counts == tuple(u_bits.count(b) for b in range(8, 0, -1))


def test_the_widths_of_a_row_of_v_and_its_column_of_u():
    packed = pack(quantized(40, 70, [5, 5, 3, 3, 3, 3, 2, 2], [4, 4, 4, 3, 3, 2, 2, 2]))
    assert packed.widths == {(5, 4): 2, (3, 4): 1, (3, 3): 2, (3, 2): 1, (2, 2): 2}
    assert packed.v_widths == {5: 2, 3: 4, 2: 2} and packed.u_widths == {4: 3, 3: 2, 2: 3}


def test_any_scale_is_within_rounding():
    v_bits, u_bits = [8, 7, 6, 5, 4, 3, 2, 1, 1], [7, 7, 7, 7, 7, 7, 3, 3, 2]
    delta = quantized(97, 130, v_bits, u_bits, exact=False)
    for restored in (pack(delta).dequantize(), delta.dequantize()):
        assert restored.dtype == torch.float32
        assert_within_rounding(restored, *by_hand(delta), terms=11)


def test_words_of_one_component_read_off_in_hexadecimal():
    """V's row, at 4 bits, lies before U's column, at 8. At 4 bits codes 0..3 are the low digits of
    bytes 0, 2, 1, 3, codes 4..7 the high ones."""
    V = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8)
    U = torch.tensor([[255, 0]], dtype=torch.uint8)
    four, eight = (torch.tensor([bits], dtype=torch.int32) for bits in (4, 8))
    packed = pack(QuantizedDelta(U, V, eight, four, torch.tensor([0.5])))
    words = [int(word) & 0xFFFFFFFF for word in packed.words]
    assert words == [0x84627351, 0x00000009, 0, 0, 0x000000FF, 0, 0, 0, 0, 0, 0, 0]
    assert packed.v_counts == (0, 0, 0, 0, 1, 0, 0, 0)
    assert packed.u_counts == (1, 0, 0, 0, 0, 0, 0, 0)
    row = [0.5 * 255 * (2 * code - 15) for code in range(1, 10)]
    assert packed.dequantize().tolist() == [row, [-x for x in row]]


@pytest.mark.parametrize("out, n", [(1, 255), (256, 257), (300, 512), (513, 700)])
def test_factors_lie_panel_by_panel_first_v_then_u(out, n):
    delta = quantized(out, n, [8, 7, 5, 3, 3, 1], [6, 6, 6, 4, 1, 1])
    words = [word & 0xFFFFFFFF for word in pack(delta).words.tolist()]
    V = packed_factor(delta.V_codes.tolist(), delta.v_bits.tolist())
    assert words == V + packed_factor(delta.U_codes.tolist(), delta.u_bits.tolist())


def test_a_panel_holds_256_codes_of_every_lane():
    """Two lanes of 8 bits, 257 codes: 64 words of each, then the 257th codes' blocks."""
    V = torch.tensor([[1] * 256 + [2], [3] * 256 + [4]], dtype=torch.uint8)
    U = torch.tensor([[5], [6]], dtype=torch.uint8)
    bits = torch.tensor([8, 8], dtype=torch.int32)
    packed = pack(QuantizedDelta(U, V, bits, bits, torch.ones(2)))
    last = [[code] + [0] * 7 for code in (2, 4, 5, 6)]
    assert packed.words.tolist() == [0x01010101] * 64 + [0x03030303] * 64 + sum(last, [])


def test_bytes_are_words_scales_and_a_row_of_counts():
    packed = pack(quantized(40, 70, [8, 3, 3, 1], [5, 5, 5, 2]))
    words = 3 * (8 + 3 + 3 + 1) + 2 * (5 + 5 + 5 + 2)  # 70 codes are 3 blocks of 32, 40 are 2
    assert packed.nbytes == 4 * (words + 4 + 16)
    assert packed.bits_per_weight == 8 * packed.nbytes / 2800


def test_a_delta_without_components_is_zero_and_takes_its_counts():
    packed = pack(quantized(5, 7, []))
    assert packed.words.numel() == packed.rank == 0 and packed.nbytes == 64
    assert torch.equal(packed.dequantize(), torch.zeros(5, 7))


def test_components_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"descending.*\[3, 4\] bits in V"):
        pack(quantized(5, 7, [3, 4], [4, 3]))
    with pytest.raises(ValueError, match=r"descending.*\[3, 4\] bits in U"):
        pack(quantized(5, 7, [4, 3], [3, 4]))


@pytest.mark.parametrize("words, scales", [(-1, 0), (1, 0), (0, 1), (0, -1)])
def test_a_packed_delta_whose_words_or_scales_do_not_fit_is_refused(words, scales):
    good = pack(quantized(40, 70, [4, 4]))

    def resized(tensor, by):
        return torch.cat([tensor, tensor[:1]]) if by > 0 else tensor[: len(tensor) + by]

    with pytest.raises(ValueError, match="40 x 70"):
        PackedDelta(resized(good.words, words), resized(good.scales, scales), good.v_counts,
                    good.u_counts, (40, 70))


def test_a_packed_delta_with_more_rows_of_v_than_columns_of_u_is_refused():
    good = pack(quantized(40, 70, [4, 4]))
    with pytest.raises(ValueError, match="as many rows of V as columns of U"):
        PackedDelta(good.words, good.scales, good.v_counts, (0, 0, 0, 0, 1, 0, 0, 0), (40, 70))
