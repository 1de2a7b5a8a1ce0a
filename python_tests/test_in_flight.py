"""Requests in line: who may run, who waits for room, and what is held for them."""

import queue
from collections import Counter

import pytest

from adamix.errors import BankError, BankFullError
from adamix.serving import in_flight
from adamix.serving.in_flight import InFlight, Line


class Bank:
    """Room for so many fine-tunes."""

    def __init__(self, slots, names):
        self.slots, self.names, self.held, self.asked = slots, list(names), Counter(), 0

    def __contains__(self, name):
        return name in self.names

    def hold(self, name, requests):
        self.asked += 1
        if name not in self.names:
            raise BankError(f"no {name}")
        if self.held[name] == 0 and len(+self.held) == self.slots:
            raise BankFullError(f"no room for {name}")
        self.held[name] += requests

    def release(self, name):
        self.held[name] -= 1


class State:
    def __init__(self, request_id):
        self.request_id = request_id


class Requests:
    """A line of them: "a1" is the first request on the fine-tune a, "-1" on the base."""

    def __init__(self, slots=2, sequences=1, size=0):
        self.bank = Bank(slots, "abc")
        self.in_flight = InFlight(self.bank, sequences)
        self.refused = {}
        self.line = Line(size, self.in_flight, self.refuse)

    def refuse(self, state, error):
        self.refused[state.request_id] = str(error)
        self.in_flight.forget(*self.in_flight.sequences(state.request_id))

    def add(self, *requests):
        for request in requests:
            self.in_flight.add(request, None if request[0] == "-" else request[0])
            self.line.put_nowait(State(request))

    def let_through(self):
        """As transformers drains its queue."""
        passed = []
        while not self.line.empty():
            try:
                passed.append(self.line.get_nowait().request_id)
            except queue.Empty:
                break
        return passed


def test_requests_of_fine_tunes_without_room_wait_and_others_pass():
    requests = Requests()
    requests.add("a1", "b1", "c1", "-1", "a2", "c2", "b2")
    assert requests.let_through() == ["a1", "b1", "-1", "a2", "b2"]
    for over, then in (("b1", []), ("-1", []), ("b2", ["c1", "c2"])):
        requests.in_flight.forget(over)
        assert requests.let_through() == then
    assert +requests.bank.held == Counter(a=2, c=2)


def test_the_bank_is_not_asked_again_before_a_fine_tune_is_released():
    requests = Requests(slots=1)
    requests.add("a1", *(f"b{i}" for i in range(50)))
    assert requests.let_through() == ["a1"]
    asked = requests.bank.asked
    assert requests.let_through() == [] and requests.bank.asked == asked


def test_so_many_pass_the_first_in_line_at_most(monkeypatch):
    monkeypatch.setattr(in_flight, "MAX_PASSING", 3)
    requests = Requests(slots=1)
    requests.add("a1", "b1", "a2", "-1", "a3", "a4", "-2")
    assert requests.let_through() == ["a1", "a2", "-1", "a3"]
    requests.in_flight.forget("a1", "a2", "a3", "-1")
    assert requests.let_through() == ["b1", "-2"]
    requests.in_flight.forget("b1")
    assert requests.let_through() == ["a4"]


def test_what_fits_beside_nothing_is_refused_and_the_next_goes_on():
    requests = Requests(slots=0)
    requests.add("a1", "-1")
    requests.bank.names.remove("b")
    with pytest.raises(BankError, match="no fine-tune 'b' is loaded; loaded are: a, c"):
        requests.add("b1")
    assert requests.let_through() == ["-1"]
    assert requests.refused == {"a1": "no room for a"}
    assert "a1" not in requests.in_flight and len(requests.in_flight) == 1


def test_every_sequence_of_a_request_holds_its_fine_tune():
    requests = Requests(slots=1, sequences=3)
    requests.add("a1", "b1")
    assert requests.let_through() == ["a1"] and requests.bank.held["a"] == 3
    requests.in_flight.forget("a1", "a1__child#1")
    assert requests.let_through() == []
    requests.in_flight.release("a1__child#0")
    assert requests.in_flight.finetune("a1__child#0") == "a" and requests.bank.held["a"] == 0
    assert requests.let_through() == ["b1"]
    requests.in_flight.forget_all()
    assert not requests.in_flight and not +requests.bank.held


def test_ids_are_told_apart():
    requests = Requests()
    requests.add("a1")
    with pytest.raises(BankError, match="'a1' is not answered yet"):
        requests.add("a1")
    requests.in_flight.add("req_1", None)
    assert [requests.in_flight.new_id() for _ in range(3)] == ["req_0", "req_2", "req_3"]


def test_a_request_is_taken_out_of_a_full_line():
    requests = Requests(slots=1, size=2)
    requests.add("a1", "b1")
    with pytest.raises(queue.Full):
        requests.line.put_nowait(State("c1"))
    assert requests.line.remove("b1") and not requests.line.remove("b1")
    requests.line.put_nowait(State("-1"))
    requests.in_flight.add("-1", None)
    assert requests.let_through() == ["a1", "-1"]


def test_all_go_through_when_they_are_to_fail():
    requests = Requests(slots=1)
    requests.add("a1", "b1", "c1")
    requests.line.is_open = True
    assert requests.let_through() == ["a1", "b1", "c1"] and not requests.bank.held
