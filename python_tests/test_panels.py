"""Slices of packed factors: the words that packing the slice gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamix.panels import pack_factor, slice_factor, unpack_factor

COUNTS = [(0,) * 8, (0, 0, 0, 0, 0, 0, 0, 1), (1, 0, 2, 0, 3, 1, 0, 4), (2, 1, 1, 1, 1, 1, 1, 1)]


def factor(n, counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lanes = [torch.randint(0, 2**bits, (count, n), generator=generator)
             for bits, count in zip(range(8, 0, -1), counts, strict=True)]
    return torch.cat(lanes).to(torch.uint8)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("n", "begin", "end"), [
    (512, 0, 256), (512, 256, 512), (600, 256, 600), (600, 0, 600), (600, 512, 600),  # panels
    (512, 32, 96), (600, 224, 544), (600, 544, 600), (96, 32, 96), (1024, 480, 1024),  # blocks
    (512, 1, 33), (600, 16, 48), (600, 32, 599), (96, 90, 96), (64, 64, 64),  # codes, nothing
])
def test_a_slice_has_the_words_that_packing_it_gives(n, begin, end, counts):
    codes = factor(n, counts)
    words = pack_factor(codes, counts)
    got = slice_factor(words, counts, n, begin, end)
    assert torch.equal(got, pack_factor(codes[:, begin:end], counts))
    assert torch.equal(unpack_factor(got, counts, end - begin), codes[:, begin:end])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.data())
def test_any_slice_unpacks_to_the_codes(n, data):
    begin = data.draw(st.integers(0, n))
    end = data.draw(st.integers(begin, n))
    counts = data.draw(st.sampled_from(COUNTS))
    codes = factor(n, counts, seed=n)
    got = slice_factor(pack_factor(codes, counts), counts, n, begin, end)
    assert torch.equal(unpack_factor(got, counts, end - begin), codes[:, begin:end])


def test_parts_of_whole_blocks_tile_the_factor():
    """As tensor parallelism cuts: 2, 4 or 8 workers share 1024 codes."""
    codes = factor(1024, COUNTS[2])
    words = pack_factor(codes, COUNTS[2])
    for workers in (2, 4, 8):
        size = 1024 // workers
        parts = [slice_factor(words, COUNTS[2], 1024, k * size, (k + 1) * size)
                 for k in range(workers)]
        together = torch.cat([unpack_factor(part, COUNTS[2], size) for part in parts], 1)
        assert torch.equal(together, codes)


def test_from_panel_to_panel_it_is_a_view():
    words = pack_factor(factor(1000, COUNTS[3]), COUNTS[3])
    whole = words.untyped_storage().data_ptr()
    for begin, end in ((256, 768), (512, 1000)):
        part = slice_factor(words, COUNTS[3], 1000, begin, end)
        assert part.untyped_storage().data_ptr() == whole
    assert slice_factor(words, COUNTS[3], 1000, 32, 288).untyped_storage().data_ptr() != whole


def test_what_is_no_slice_is_refused():
    words = pack_factor(factor(64, COUNTS[3]), COUNTS[3])
    for begin, end in ((-1, 3), (4, 3), (0, 65)):
        with pytest.raises(ValueError, match="are no slice of 64"):
            slice_factor(words, COUNTS[3], 64, begin, end)
    with pytest.raises(ValueError, match="lanes of 96 codes have"):
        slice_factor(words, COUNTS[3], 96, 0, 32)
