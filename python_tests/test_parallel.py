"""workers and in_order: threads side by side, bounded, in order."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adamix.parallel import in_order, workers


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_results_come_in_order_and_no_more_than_ahead_are_begun(ahead):
    begun, taken = [], 0
    gate = threading.Semaphore(0)

    def work(item):
        gate.acquire()
        return item * item

    def items():
        for item in range(8):
            begun.append(item)
            yield item

    with ThreadPoolExecutor(8) as executor:
        results = in_order(executor, work, items(), ahead)
        for _ in range(8):
            gate.release(8)
            assert next(results) == taken * taken
            taken += 1
            assert len(begun) <= taken + ahead
        assert next(results, None) is None


def test_an_error_comes_where_its_item_stands():
    with ThreadPoolExecutor(2) as executor:
        results = in_order(executor, lambda item: 1 // item, [1, 1, 0, 1], 2)
        assert [next(results), next(results)] == [1, 1]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_products_have_one_thread_inside_and_their_own_number_again_after():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with workers(2) as executor:
            seen = set(executor.map(lambda _: torch.get_num_threads(), range(8)))
            assert seen == {1} and torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_no_threads_at_all_are_refused():
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"), workers(0):
        pass
