"""Names <-> kinds and numbers, against texts that a person can check."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamix.naming import (
    group_by_kind,
    index_of,
    kind_of,
    name_of,
    read_indices,
    write_indices,
)

UP = "model.layers.*.mlp.up_proj.weight"
EXPERT = "model.layers.*.mlp.experts.*.w1.weight"

GOLDEN = [
    ("lm_head.weight", "lm_head.weight", ()),
    ("model.layers.3.mlp.up_proj.weight", UP, (3,)),
    ("model.layers.10.mlp.experts.7.w1.weight", EXPERT, (10, 7)),
    ("0.weight", "*.weight", (0,)),
    ("h.2", "h.*", (2,)),
    ("conv2d.w1.weight", "conv2d.w1.weight", ()),
]


@pytest.mark.parametrize("name, kind, index", GOLDEN)
def test_a_name_is_its_kind_and_its_numbers(name, kind, index):
    assert (kind_of(name), index_of(name), name_of(kind, index)) == (kind, index, name)


def test_a_number_that_would_not_come_back_as_written_keeps_its_name():
    name = "blocks.01.weight"
    assert name_of(kind_of(name), index_of(name)) == name


@pytest.mark.parametrize("kind, indices, text", [
    ("lm_head.weight", [()], ""),
    (UP, [(0,)], "0"),
    (UP, [(i,) for i in range(28)], "0-27"),
    (UP, [(0,), (1,), (3,), (5,), (6,), (7,)], "0-1 3 5-7"),
    (EXPERT, [(layer, i) for layer in (0, 1) for i in range(8)], "0.0-7 1.0-7"),
    (EXPERT, [(0, 7), (1, 8), (2, 0), (2, 1)], "0.7 1.8 2.0-1"),
    ("a.*.b.*.c.*", [(1, 2, 3), (1, 2, 4), (1, 3, 5)], "1.2.3-4 1.3.5"),
])
def test_numbers_are_written_as_runs_and_read_back(kind, indices, text):
    names = [name_of(kind, index) for index in indices]
    assert write_indices(kind, names) == text
    assert read_indices(kind, text) == names


@settings(max_examples=200, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1),
       st.sets(st.integers(0, 200), min_size=1))
def test_any_set_of_numbers_round_trips(pairs, numbers):
    for kind, indices in ((EXPERT, sorted(pairs)), (UP, [(i,) for i in sorted(numbers)])):
        names = [name_of(kind, index) for index in indices]
        assert read_indices(kind, write_indices(kind, names)) == names


def test_a_kinds_names_stand_in_the_order_of_their_numbers_not_of_their_letters():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (10, 9, 2, 11, 1)]
    grouped = group_by_kind(dict.fromkeys(["lm_head.weight", *names], (4, 4)))
    assert list(grouped) == ["lm_head.weight", UP]
    assert grouped[UP] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2, 9, 10, 11)]
    assert write_indices(UP, grouped[UP]) == "1-2 9-11"


def test_experts_are_ordered_by_layer_then_by_expert():
    names = [f"model.layers.{layer}.mlp.experts.{i}.w1.weight"
             for i in (10, 2) for layer in (1, 0)]
    grouped = group_by_kind(dict.fromkeys(names, "same"))
    assert list(map(index_of, grouped[EXPERT])) == [(0, 2), (0, 10), (1, 2), (1, 10)]


def test_names_of_one_kind_with_different_shapes_are_each_a_kind_of_their_own():
    traits = {"l.0.w": (4, 4), "l.1.w": (4, 4), "l.2.w": (4, 8), "l.1.b": (4,), "l.0.b": (4,)}
    grouped = group_by_kind(traits)
    assert grouped == {"l.0.w": ["l.0.w"], "l.1.w": ["l.1.w"], "l.2.w": ["l.2.w"],
                       "l.*.b": ["l.0.b", "l.1.b"]}
    for kind, names in grouped.items():
        assert read_indices(kind, write_indices(kind, names)) == names


@pytest.mark.parametrize("text", ["x", "-1", "0-", "0-x", "0.1", "1.", "0,1", "1.2.3", "3-1"])
def test_text_that_was_never_written_is_refused(text):
    with pytest.raises(ValueError):
        read_indices(UP, text)


@pytest.mark.parametrize("text", ["3", "0-1", "0.1.2", "0.1-x"])
def test_one_number_for_a_kind_of_two_is_refused(text):
    with pytest.raises(ValueError):
        read_indices(EXPERT, text)
