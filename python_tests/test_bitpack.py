"""Codes <-> words. Exact: every bit has one right value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import packed_lane

from adamix import ops

OPERATORS = ("pack", "unpack")
WIDTHS = range(1, ops.MAX_BITS + 1)
LENGTHS = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 1024, 1056]


def words_of(words: torch.Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in lane] for lane in words.tolist()]


def random_codes(lanes: int, n: int, bits: int, device: str) -> torch.Tensor:
    return torch.randint(0, 2**bits, (lanes, n), dtype=torch.uint8).to(device)


def test_three_bit_words_are_those_of_the_drawing(device):
    """Field f holds four times the code f, so all bytes of a word are alike, and their bits are
    those that stand in packed_layout.h's drawing: [6 6|1 1 1|0 0 0], [7 6|..], [7 7|..]."""
    codes = torch.arange(8, dtype=torch.uint8, device=device).repeat_interleave(4)[None]
    words = [0b10_001_000, 0b11_011_010, 0b11_101_100]
    assert words_of(ops.pack(codes, bits=3)) == [[0x01010101 * byte for byte in words]]


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (1, [1, 0, 0, 0, 1], [0b11]),
        (1, [0] * 31 + [1, 1], [0x80000000, 0x1]),
        (2, [0, 1, 2, 3], [0x03010200, 0]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0xA], [0x84627351, 0x000A0009, 0, 0]),
        (5, [0b11111] * 7, [0x1F1F1F1F, 0x001F1F1F, 0, 0, 0]),
        (5, [0] * 20 + [0b11111], [0b111_00000, 0b011_00000, 0, 0, 0]),
        (6, [0] * 29 + [0b100011], [0, 0, 0, 0xC0 << 16, 0, 0x80 << 16]),
        (7, [0] * 28 + [0b1000001], [0x80, 0, 0, 0, 0, 0, 0x80]),
        (8, [0x11, 0x22, 0x33, 0x44, 0x55], [0x44223311, 0x55, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_words_that_a_person_can_check(device, bits, codes, words):
    packed = ops.pack(torch.tensor([codes], dtype=torch.uint8, device=device), bits=bits)
    assert packed.dtype == torch.int32
    assert words_of(packed) == [words]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", LENGTHS)
def test_pack_writes_the_defined_words_and_unpack_inverts_it(device, bits, n):
    codes = random_codes(3, n, bits, device)
    words = ops.pack(codes, bits=bits)
    assert words.shape == (3, ops.lane_words(n, bits))
    assert words_of(words) == [packed_lane(lane, bits) for lane in codes.tolist()]
    assert ops.unpack(words, bits=bits, count=n).equal(codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_reads_any_words_as_codes(device, bits):
    words = torch.randint(-(2**31), 2**31, (2, 2 * bits), dtype=torch.int32).to(device)
    codes = ops.unpack(words, bits=bits, count=64)
    assert [packed_lane(lane, bits) for lane in codes.tolist()] == words_of(words)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_codes_survive(data):
    bits = data.draw(st.integers(1, 8))
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=100))
    lane = torch.tensor([codes], dtype=torch.uint8)
    words = ops.pack(lane, bits=bits)
    assert words_of(words) == [packed_lane(codes, bits)]
    assert ops.unpack(words, bits=bits, count=len(codes)).equal(lane)


def test_many_lanes_over_threads():
    codes = random_codes(700, 333, 3, "cpu")
    words = ops.pack(codes, bits=3)
    assert ops.unpack(words, bits=3, count=333).equal(codes)
    assert words_of(words[-1:]) == [packed_lane(codes[-1].tolist(), 3)]


def test_sizes_agree_with_their_definition():
    counts = [2, 0, 0, 0, 0, 3, 0, 1]  # at 8, 7 .. 1 bits; 33 codes are two blocks
    assert ops.lane_words(33, 3) == 6
    assert ops.v_words(33, counts) == 2 * 16 + 3 * 6 + 1 * 2
    assert ops.u_words(33, counts) == ops.v_words(33, counts)
    assert (ops.BLOCK_CODES, ops.PANEL_CODES, ops.MAX_BITS) == (32, 256, 8)
    assert ops.LAYOUT_VERSION == 3
    assert ops.TABLE_FIRST_U_COUNT == ops.TABLE_FIRST_V_COUNT + ops.MAX_BITS
    assert ops.TABLE_COLUMNS == ops.TABLE_FIRST_U_COUNT + ops.MAX_BITS


def test_sizes_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match=r"bits must be 1\.\.8, got 9"):
        ops.lane_words(33, 9)
    with pytest.raises(ValueError, match="codes must not be negative, got -1"):
        ops.lane_words(-1, 3)
    with pytest.raises(ValueError, match="counts must not be negative, got -2"):
        ops.v_words(33, [0, -2, 0, 0, 0, 0, 0, 0])
