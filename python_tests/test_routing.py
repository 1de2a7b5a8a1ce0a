"""Routing: rows, tokens and beams to slots, in a buffer that stays where it is."""

import pytest
import torch

from adamix.errors import BankError
from adamix.serving.routing import BASE, MAX_ROWS, Routing

SLOTS = 6  # of the bank; on the device it stands for the base


@pytest.fixture
def routing():
    return Routing(torch.device("cpu"), SLOTS)


def test_at_first_everything_is_the_bases(routing):
    assert routing.of(1).tolist() == [SLOTS] and routing.of(6).tolist() == [SLOTS] * 6


def test_a_row_has_adjacent_tokens_and_beams(routing):
    routing.write([2, BASE, 0])
    assert routing.of(3).tolist() == [2, SLOTS, 0]
    assert routing.of(6).tolist() == [2, 2, SLOTS, SLOTS, 0, 0]
    assert routing.of(3).dtype == torch.int32


def test_the_buffer_is_rewritten_in_place(routing):
    routing.write([1, 2])
    view = routing.of(2)
    routing.write([5, BASE])
    assert view.tolist() == [5, SLOTS] and view.data_ptr() == routing.slots.data_ptr()


def test_by_token_what_follows_is_the_bases(routing):
    routing.write([3, 3, 3, 3])
    routing.write([1, 0], by_token=True)
    assert routing.of(4).tolist() == [1, 0, SLOTS, SLOTS] and routing.of(1).tolist() == [1]


@pytest.mark.parametrize("count", [4, 5, 7])
def test_rows_that_do_not_fit_are_refused_in_words(routing, count):
    routing.write([0, 1, 2])
    with pytest.raises(BankError, match=f"3 rows are routed, which {count} rows"):
        routing.of(count)


@pytest.mark.parametrize("count", [0, MAX_ROWS + 1])
def test_a_route_has_rows(routing, count):
    with pytest.raises(BankError, match=f"1..{MAX_ROWS} rows, got {count}"):
        routing.write([0] * count)


VALUES = torch.tensor([[10.0, 11], [20, 21], *[[30, 31]] * (SLOTS - 2), [90, 91]])  # base last


def test_values_are_gathered_by_row_and_broadcast(routing):
    routing.write([1, BASE])
    gathered = routing.gather(VALUES, torch.zeros(2, 5, 2), 1)
    assert gathered.tolist() == [[[20, 21]], [[90, 91]]]
    assert routing.gather(VALUES, torch.zeros(2, 3, 5, 2), 2).shape == (2, 1, 1, 2)
    beams = routing.gather(VALUES, torch.zeros(4, 5, 2), 1)
    assert beams[:, 0, 0].tolist() == [20, 20, 90, 90]
    flat = routing.gather(VALUES, torch.zeros(6, 2), 1)  # tokens of two rows
    assert flat[:, 0].tolist() == [20, 20, 20, 90, 90, 90]


def test_values_are_gathered_by_token_where_the_tokens_are(routing):
    routing.write([1, 0, BASE], by_token=True)
    first = routing.gather(VALUES, torch.zeros(1, 3, 2), 1)
    assert first.shape == (1, 3, 2) and first[0, :, 0].tolist() == [20, 10, 90]
    behind_heads = routing.gather(VALUES, torch.zeros(1, 4, 3, 2), 2)
    assert behind_heads.shape == (1, 1, 3, 2) and behind_heads[0, 0, :, 1].tolist() == [21, 11, 91]
    by_head = routing.gather(VALUES, torch.zeros(1, 3, 4, 2), 1)
    assert by_head.shape == (1, 3, 1, 2) and by_head[0, :, 0, 1].tolist() == [21, 11, 91]
    flat = routing.gather(VALUES, torch.zeros(3, 2), 1)
    assert flat[:, 0].tolist() == [20, 10, 90]


def test_in_a_pass_a_table_is_gathered_once(routing):
    table = torch.arange(35.0).reshape(SLOTS + 1, 5)
    values, like = table[:, 2:4], torch.zeros(2, 4, 2)

    def gather(like=like):
        return routing.gather(values, like, 1, table, 2)

    routing.write([1, BASE])
    routing.begin_pass()
    once = gather()
    assert once.tolist() == [[[7, 8]], [[32, 33]]]
    assert gather().untyped_storage().data_ptr() == once.untyped_storage().data_ptr()
    flat = gather(torch.zeros(6, 2))  # not the routed rows: on their own
    assert flat[:, 0].tolist() == [7, 7, 7, 32, 32, 32]
    routing.write([0, 2])  # within the pass
    assert gather().tolist() == [[[2, 3]], [[12, 13]]]
    routing.end_pass()
    table += 100
    assert gather().tolist() == [[[102, 103]], [[112, 113]]]
    routing.begin_pass()
    assert gather().tolist() == [[[102, 103]], [[112, 113]]]
    routing.write([1, 0], by_token=True)
    assert gather(torch.zeros(1, 2, 2)).tolist() == [[[107, 108], [102, 103]]]


def test_a_shorter_route_leaves_nothing_of_the_one_before(routing):
    address = routing.slots.data_ptr()
    for slots in ([1, 0, 1, 1, 0], [0], [1, 1, 0]):
        routing.write(slots, by_token=True)
        assert routing.of(8).tolist() == slots + [SLOTS] * (8 - len(slots))
    assert routing.slots.data_ptr() == address


def test_selected_tokens_are_routed_as_they_were_among_all(routing):
    routing.write([1, 0, 0, 2], by_token=True)
    last = torch.tensor([0, 3, 2], dtype=torch.int32)
    routing.select(last)
    assert routing.of(3).tolist() == [1, 2, 0]
    last.copy_(torch.tensor([1, 1, 3]))
    assert routing.of(3).tolist() == [0, 0, 2]
    with pytest.raises(BankError, match="3 tokens are selected, got 4"):
        routing.of(4)
    routing.select(None)
    assert routing.of(4).tolist() == [1, 0, 0, 2]
    routing.select(last)
    routing.write([2, 1], by_token=True)
    assert routing.of(2).tolist() == [2, 1]
