"""The arena: extents never overlap, all memory comes back, neighbours become one."""

import random

import pytest
import torch

from adamix.serving.arena import ALIGNMENT, Arena, aligned

CPU = torch.device("cpu")


def test_extents_are_aligned_and_the_whole_arena_can_be_given_out():
    arena = Arena(4 * ALIGNMENT, CPU)
    assert arena.words.dtype == torch.int32 and arena.size == arena.words.numel() == 4 * ALIGNMENT
    begins = [arena.allocate(words) for words in (1, ALIGNMENT, ALIGNMENT + 1)]
    assert begins == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert arena.free_words == 0 and arena.allocate(1) is None


def test_a_size_is_rounded_up():
    assert Arena(1, CPU).size == ALIGNMENT == aligned(1) and aligned(0) == 0


def test_the_smallest_stretch_that_holds_it_is_taken():
    arena = Arena(10 * ALIGNMENT, CPU)
    begins = [arena.allocate(n * ALIGNMENT) for n in (3, 1, 2, 1, 3)]
    arena.release(begins[0], 3 * ALIGNMENT)
    arena.release(begins[2], 2 * ALIGNMENT)
    assert arena.allocate(2 * ALIGNMENT) == begins[2]
    assert arena.allocate(2 * ALIGNMENT) == begins[0]
    assert arena.allocate(2 * ALIGNMENT) is None and arena.free_words == ALIGNMENT


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_stretches_that_touch_become_one(order):
    arena = Arena(3 * ALIGNMENT, CPU)
    begins = [arena.allocate(1) for _ in range(3)]
    for i in order:
        arena.release(begins[i], 1)
    assert arena.allocate(3 * ALIGNMENT) == 0


def test_random_use_never_overlaps_and_loses_nothing():
    choose, arena, held = random.Random(0), Arena(40 * ALIGNMENT, CPU), {}
    for step in range(2000):
        if held and (choose.random() < 0.45 or len(held) > 12):
            begin = choose.choice(list(held))
            arena.release(begin, held.pop(begin))
        else:
            words = choose.randint(1, 7 * ALIGNMENT)
            begin = arena.allocate(words)
            if begin is not None:
                held[begin] = words
        spans = sorted((begin, begin + aligned(words)) for begin, words in held.items())
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)), step
        assert arena.free_words == arena.size - sum(end - begin for begin, end in spans)
    for begin, words in held.items():
        arena.release(begin, words)
    assert arena.allocate(arena.size) == 0
